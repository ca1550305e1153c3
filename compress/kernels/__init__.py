"""The arithmetic that is worth native code: one signature per operation; `dispatch` chooses, `reference` checks."""
