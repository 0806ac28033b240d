"""What one sub-layer, or one block, of a trained model is worth: the loss without it."""
