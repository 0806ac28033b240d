"""Engines: what makes a training step."""
