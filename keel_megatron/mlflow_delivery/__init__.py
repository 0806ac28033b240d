"""Delivery of a run's records to MLflow, by a process of its own."""
