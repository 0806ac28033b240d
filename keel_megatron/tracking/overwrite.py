"""Take back points of an MLflow run, which MLflow's interface cannot: in a sqlite file only."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

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


def delete_after(database: Path, run_id: str, step: int) -> int:
    """Delete a run's points after a step, except those of the machines (`system/`).

    Returns:
        How many points went.

    Raises:
        sqlite3.Error: the file is locked for long, or its tables are not as MLflow 3.17 has them.
    """
    values = {"run": run_id, "step": step}
    with closing(sqlite3.connect(database, timeout=_WAIT_SECONDS)) as connection, connection:
        gone = connection.execute(_DELETE.format(table="metrics"), values).rowcount
        connection.execute(_DELETE.format(table="latest_metrics"), values)
        connection.execute(_LATEST, values)
    return gone
