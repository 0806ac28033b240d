"""The loop, the step, the optimizer and its schedule."""
