"""Depth profiles: statistics of every sub-layer, collected, stored and drawn."""
