"""What a run shows: progress, metrics.jsonl, MLflow."""
