"""Engines: forward, backward and update of a training step."""
