"""The compressed model on disk: staging a run, publishing it whole, reading, checking and comparing it.

Nothing here imports torch at module level, so that `compress list`, `show` and `verify` stay quick.
"""
