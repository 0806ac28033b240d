"""Keel-Megatron: train very deep language models of the Keel kind on Megatron-core."""

__version__ = "0.1.0.dev0"
