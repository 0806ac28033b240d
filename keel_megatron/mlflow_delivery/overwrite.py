"""Changes of an MLflow run that MLflow's interface cannot make: in a sqlite file only.

Every function raises sqlite3.Error if the file is locked for long, or if its tables are not as
MLflow 3.17 has them.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

from keel_megatron.tracking.metric_names import NAMES

# MLflow 3.17: `metrics` has every point; `latest_metrics` has of every key the one that is last by
# (step, timestamp, value), which is what MLflow shows as the metric's value.
_DELETE = "DELETE FROM {table} WHERE run_uuid = :run AND step > :step AND key NOT LIKE 'system/%'"
_LATEST = """
INSERT INTO latest_metrics (key, value, timestamp, step, is_nan, run_uuid)
SELECT key, value, timestamp, step, is_nan, run_uuid FROM (
    SELECT *, ROW_NUMBER() OVER (
        PARTITION BY key ORDER BY step DESC, timestamp DESC, value DESC
    ) AS place FROM metrics
    WHERE run_uuid = :run
    AND key NOT IN (SELECT key FROM latest_metrics WHERE run_uuid = :run)
) WHERE place = 1
"""
_WAIT_SECONDS = 20.0


DEFAULT_EXPERIMENT = "Default"
HIDE_DEFAULT = """
UPDATE experiments SET lifecycle_stage = CASE
    WHEN EXISTS (SELECT 1 FROM runs WHERE runs.experiment_id = 0) THEN 'active' ELSE 'deleted' END
WHERE experiment_id = 0 AND name = 'Default'
"""
"""Hide the experiment that MLflow makes in every database, unless it has runs.

Not a DELETE: MLflow would make it again.
"""


def delete_after(database: Path, run_id: str, step: int) -> int:
    """Delete a run's points after a step, except those of the machines (`system/`).

    Returns:
        How many points went.
    """
    values = {"run": run_id, "step": step}
    with _opened(database) as connection:
        gone = connection.execute(_DELETE.format(table="metrics"), values).rowcount
        connection.execute(_DELETE.format(table="latest_metrics"), values)
        connection.execute(_LATEST, values)
    return gone


def set_params(database: Path, run_id: str, params: Mapping[str, str]) -> None:
    """Give a run's parameters other values."""
    with _opened(database) as connection:
        connection.executemany(
            "UPDATE params SET value = ? WHERE key = ? AND run_uuid = ?",
            [(value, key, run_id) for key, value in params.items()],
        )


def settle(database: Path, artifacts: str, experiment: str) -> None:
    """Bring a run's own database up to date with its folder and with this version.

    Files lie where the folder is now, metrics have this version's names, and the default experiment
    is hidden unless it is in use.

    Args:
        database: the file in the run's folder.
        artifacts: URI of the folder of artifacts.
        experiment: name of the run's experiment.
    """
    with _opened(database) as connection:
        connection.execute(
            "UPDATE runs SET artifact_uri = :base || '/' || run_uuid || '/artifacts' "
            "WHERE artifact_uri != :base || '/' || run_uuid || '/artifacts'",
            {"base": artifacts},
        )
        connection.execute(
            "UPDATE experiments SET artifact_location = :base "
            "WHERE artifact_location != :base AND experiment_id != 0",
            {"base": artifacts},
        )
        for table in ("metrics", "latest_metrics"):
            connection.executemany(
                f"UPDATE OR REPLACE {table} SET key = ? WHERE key = ?",
                [(new, old) for old, new in NAMES.items()],
            )
            connection.execute(
                f"UPDATE OR REPLACE {table} SET key = replace(key, '/', '.') "
                "WHERE key >= 'depth/' AND key < 'depth0'"
            )
        if experiment != DEFAULT_EXPERIMENT:
            connection.execute(HIDE_DEFAULT)


@contextmanager
def _opened(database: Path) -> Iterator[sqlite3.Connection]:
    """A connection, and a transaction that ends with the block."""
    with closing(sqlite3.connect(database, timeout=_WAIT_SECONDS)) as connection, connection:
        yield connection
