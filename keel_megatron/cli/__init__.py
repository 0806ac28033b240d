"""The `keel` command: one small module per command."""
