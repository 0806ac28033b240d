"""Migration of the databases that earlier versions kept in each run's folder to the shared one.

It happens once: RUN/mlflow.db is then renamed to mlflow.db.taken_over. Only MLflow's interface is
used. An interrupted migration starts again, and continues with the MLflow runs that exist.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from keel_megatron.mlflow_delivery.client import experiment_id, open_client
from keel_megatron.mlflow_delivery.database import (
    ARTIFACTS,
    NAME,
    artifacts_uri,
    copy_foreign,
    database_of,
    link_artifacts,
    local_uri,
    prepare,
)
from keel_megatron.mlflow_delivery.presence import the_only_one
from keel_megatron.mlflow_delivery.run_file import original_of
from keel_megatron.mlflow_delivery.sqlite_uri import sqlite_uri
from keel_megatron.mlflow_delivery.target import remember_run_id, remembered_run_id
from keel_megatron.tracking.metric_names import mlflow_name

TAKEN_OVER = "keel.taken_over"
"""Tag of an MLflow run: its id in the earlier database."""
_SUFFIX = ".taken_over"
_PER_CALL = 100
_POINTS_PER_CALL = 1000


def has_earlier_database(run: Path) -> bool:
    """Whether a run's folder has a database that was not migrated yet."""
    database = run / NAME
    return database.is_file() and not database.is_symlink()


def take_over_now(run: Path) -> bool:
    """Migrate a run's own database, if it has one and no process delivers its reports.

    The database in a copy of another run's folder is not migrated.

    Returns:
        Whether it was migrated.

    Raises:
        DatabaseError: the earlier database cannot be read, or the shared one is not this user's.
    """
    if not has_earlier_database(run) or original_of(run) is not None:
        return False
    with the_only_one(run, wait=False) as free:
        if free:
            prepare(database_of(run))
            take_over(run, open_client(local_uri(run)))
    return free


def take_over(run: Path, client: Any) -> None:
    """Move the MLflow runs of a run's own database to the shared one.

    Notes, tags, names, parameters, points, times and states are kept; points get this version's
    metric names. The ids are new, because MLflow assigns them; the run's files and `mlflow_run_id`
    are updated.

    Args:
        run: the run's folder; no other process delivers its reports meanwhile.
        client: MLflow's client of the shared database.

    Raises:
        DatabaseError: the earlier database cannot be read. It is left in place.
    """
    if not has_earlier_database(run):
        return
    artifacts = artifacts_uri(database_of(run))
    with tempfile.TemporaryDirectory(prefix="keel-mlflow-") as folder:
        copy = Path(folder) / NAME
        # The run's folder is untrusted, and may be read-only.
        copy_foreign(run / NAME, copy)
        source = open_client(sqlite_uri(copy))
        for experiment in source.search_experiments():
            for found in _runs(source, [experiment.experiment_id]):
                name = experiment.name
                target = experiment_id(client, name, artifacts, local=True)
                _take_run(run, source, found, client, target)
    for path in sorted(run.glob(f"{NAME}*")):
        part = path.name.removeprefix(NAME)
        if part in ("", "-wal", "-shm"):
            with suppress(OSError):
                path.rename(run / f"{NAME}{_SUFFIX}{part}")


def move_artifacts(run: Path, before: str, after: str) -> None:
    """Move an MLflow run's files in a run's folder to another MLflow run, and link them."""
    old, new = (run.resolve() / ARTIFACTS / run_id for run_id in (before, after))
    with suppress(OSError):
        if old.is_dir() and not new.exists():
            old.rename(new)
    link_artifacts(run, after)


def _take_run(run: Path, source: Any, found: Any, client: Any, experiment_id: str) -> None:
    from mlflow.entities import Metric, Param

    before, data = str(found.info.run_id), found.data
    made = _runs(client, [experiment_id], f"tags.`{TAKEN_OVER}` = '{before}'")
    target = next(made, None)
    if target is None:  # else its tags may have been edited since
        target = client.create_run(
            experiment_id,
            start_time=found.info.start_time,
            run_name=found.info.run_name,
            tags=data.tags | {TAKEN_OVER: before},
        )
    after = str(target.info.run_id)
    params = [Param(key, value) for key, value in data.params.items()]
    for start in range(0, len(params), _PER_CALL):
        client.log_batch(after, params=params[start : start + _PER_CALL])
    for name in data.metrics:
        points = [
            Metric(mlflow_name(name), point.value, point.timestamp, point.step)
            for point in source.get_metric_history(before, name)
        ]
        for start in range(0, len(points), _POINTS_PER_CALL):
            client.log_batch(after, metrics=points[start : start + _POINTS_PER_CALL])
    if found.info.status != "RUNNING":
        client.set_terminated(after, found.info.status, end_time=found.info.end_time)
    move_artifacts(run, before, after)
    if remembered_run_id(run) == before:
        remember_run_id(run, after)


def _runs(client: Any, experiments: list[str], wanted: str = "") -> Iterator[Any]:
    """All MLflow runs of these experiments that are not deleted."""
    token = None
    while True:
        page = client.search_runs(experiments, wanted, page_token=token)
        yield from page
        token = page.token
        if not token:
            return
