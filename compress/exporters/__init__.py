"""From an artifact to another engine's format, one file per target."""
