"""Sharded checkpoints: save, find, load."""
