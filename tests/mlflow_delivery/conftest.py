"""What the tests of the MLflow worker share."""

from __future__ import annotations

import pytest

from keel_megatron.mlflow_delivery import process


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine takes more than a run's 30 s to import MLflow and make a database."""
    monkeypatch.setattr(process, "CLOSE_SECONDS", 200.0)
