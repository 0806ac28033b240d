"""A training run: start, loop, guard, learning rate, end."""
