"""`keel bench`: where the time of a step goes."""
