"""The `keel` command: one thin file a verb."""
