"""The loss of a trained model without one of its sub-layers or blocks."""
