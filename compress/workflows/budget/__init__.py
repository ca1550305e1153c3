"""Mixed precision under a budget: measured sensitivity, an exact choice, and the recipe that says it."""
