"""Engines: forward pass, backward pass and update of a training step."""
