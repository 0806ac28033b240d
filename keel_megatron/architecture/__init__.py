"""Description of a model in plain values. Imports no torch, so every package may import it."""
