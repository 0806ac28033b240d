"""What the tests of depth profiles share with those of the MLflow worker, which draws them."""

from tests.mlflow_delivery.conftest import patience

__all__ = ["patience"]
