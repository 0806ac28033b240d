"""`keel bench`: time of a training step, by part."""
