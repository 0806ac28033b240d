"""What a model is, in plain values: no torch, no configuration, so that every room may ask it."""
