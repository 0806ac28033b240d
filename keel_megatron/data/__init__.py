"""Training data: corpora, tokenizers, indexed tokens and batches."""
