"""Records and configurations that the tests of tracking share."""

from __future__ import annotations

import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from keel_megatron.config.run import RunConfig
from keel_megatron.mlflow_delivery.database import NAME, prepare
from keel_megatron.mlflow_delivery.target import tracking_uri
from keel_megatron.tracking.records import StepRecord
from tests.settings import small_config


def record(step: int, loss: float = 1.0, **values: float) -> StepRecord:
    fields: dict[str, Any] = {
        "grad_norm": 0.5,
        "learning_rate": 1e-3,
        "consumed_samples": 16 * step,
        "consumed_tokens": 512 * step,
        "tokens_per_second": 1000.0,
        "tflops_per_device": 0.1,
        "memory_gb": 1.5,
        "seconds": 0.5,
    }
    return StepRecord(step=step, loss=loss, **(fields | values))


@lru_cache(maxsize=1)
def template() -> bytes:
    """A new database: making MLflow's tables takes seconds, so once for all tests."""
    with tempfile.TemporaryDirectory() as folder:
        database = Path(folder) / NAME
        prepare(database)
        return database.read_bytes()


def place_template(runs_dir: Path) -> None:
    """Put a new database into a folder of runs."""
    database = runs_dir / NAME
    if not database.exists():
        runs_dir.mkdir(parents=True, exist_ok=True)
        database.write_bytes(template())
        database.chmod(0o600)


def config(tmp_path: Path, **overrides: Any) -> RunConfig:
    place_template(tmp_path)
    wanted: dict[str, Any] = {
        "training__runs_dir": str(tmp_path),
        "training__steps": 4,
        "tracking__mlflow": True,
    }
    return small_config(**(wanted | overrides))


def mlflow_client(run: RunConfig) -> Any:
    return MlflowClient(tracking_uri=tracking_uri(run))


def mlflow_runs(run: RunConfig) -> list[Any]:
    """The MLflow runs of a run's experiment, oldest first."""
    client = mlflow_client(run)
    experiment = client.get_experiment_by_name(run.tracking.experiment)
    return list(client.search_runs([experiment.experiment_id], order_by=["start_time ASC"]))


def history(run: RunConfig, run_id: str, key: str) -> list[tuple[int, float]]:
    points = mlflow_client(run).get_metric_history(run_id, key)
    return [(point.step, point.value) for point in points]
