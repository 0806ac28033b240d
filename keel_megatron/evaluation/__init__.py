"""Evaluation of a model: benchmarks through lm-eval, tasks in the training loop, perplexity."""
