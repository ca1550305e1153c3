"""Measurements behind docs/benchmarks.md. Run the scripts from the repository root; README.md explains each."""
