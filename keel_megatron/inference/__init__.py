"""Generate text from a trained run."""
