"""What a run writes down and shows: its log, and its progress."""
