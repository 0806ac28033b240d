"""Depth profiles: collecting, storing and drawing what every sub-layer does."""
