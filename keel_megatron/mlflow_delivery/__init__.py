"""Delivery of a run's records to MLflow, by a separate process."""
