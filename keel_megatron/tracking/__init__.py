"""A run's log and its progress display."""
