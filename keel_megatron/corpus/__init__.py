"""Builds a dataset folder from sources: files, formats, tokenizers, tasks, executors."""
