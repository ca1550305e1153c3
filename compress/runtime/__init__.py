"""Running a model: one protocol, `score` and `generate`, and the back ends that implement it."""
