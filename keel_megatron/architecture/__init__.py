"""What a model is, in plain values: no torch, no configuration, so every package may import it."""
