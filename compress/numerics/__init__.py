"""Numeric layouts of weights and of inputs, a family a file; `compress.types` is where the rest takes them from."""
