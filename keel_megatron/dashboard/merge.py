"""One MLflow database over the sqlite files of many runs.

MLflow's server reads one database, and every run has its own. So the runs are copied, row by row,
into a database that lives as long as the dashboard, and what is new is copied while it is open: of
the metrics the rows after the last one, or all of them if a run that goes on from a checkpoint has
taken some back. The runs' own files are only read: no page of the dashboard can make a trainer wait
or change what it has written. Artifacts are not copied: they are shown from where they lie.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from keel_megatron.mlflow_delivery.overwrite import HIDE_DEFAULT

TRAINING_PAGES = "?workflowType=machine_learning"
"""MLflow's pages for training rather than for language model applications."""
_KIND = ("mlflow.experimentKind", "custom_model_development")
"""The experiment's tag that says the same."""
_ARTIFACTS = "mlflow_artifacts"
_BY_RUN = ("params", "tags", "latest_metrics")
_BUSY_SECONDS = 30.0
LARGEST = 16 << 30
"""Bytes of a database; a larger one is not copied."""


@dataclass
class Source:
    """A run's database, and how much of it was copied."""

    path: Path
    state: tuple[tuple[int, int], ...] = ()
    """Time and size of its files when it was read last."""
    last: int = 0
    """Row number of the last metric that was copied."""
    copied: tuple[object, ...] = ()
    """How many metrics were, and the last one."""


class MergedStore:
    """The database that the server reads.

    Args:
        path: its file, which has MLflow's tables (the server makes them).
        sources: the runs' databases.
    """

    def __init__(self, path: Path, sources: Sequence[Path]) -> None:
        self._path = path
        self._sources = [Source(source) for source in sources]

    def refresh(self) -> list[str]:
        """Copy what is new; what could not be read, a line each, is tried again next time."""
        problems = []
        for source in self._sources:
            state = _state(source.path)
            if state == source.state:
                continue
            size = database_bytes(source.path)
            if size > LARGEST:
                problems.append(
                    f"{source.path}: it has {size / 1e9:,.1f} GB, and the dashboard copies up to "
                    f"{LARGEST / 1e9:,.1f} GB of a run"
                )
                continue
            try:
                self._copy(source)
            except (sqlite3.Error, ValueError) as error:
                problems.append(f"{source.path}: {error}")
                continue
            source.state = state
        return problems

    def run_pages(self) -> list[tuple[str, str]]:
        """Names of the runs and the ends of their pages' addresses, the newest run first."""
        with closing(sqlite3.connect(self._path, timeout=_BUSY_SECONDS)) as target:
            rows = target.execute(
                "SELECT name, experiment_id, run_uuid FROM runs "
                "WHERE lifecycle_stage = 'active' ORDER BY start_time DESC"
            ).fetchall()
        return [
            (name, f"#/experiments/{experiment}/runs/{run}{TRAINING_PAGES}")
            for name, experiment, run in rows
        ]

    def _copy(self, source: Source) -> None:
        with closing(sqlite3.connect(self._path, timeout=_BUSY_SECONDS, uri=True)) as target:
            where = f"file:{quote(str(source.path.resolve()))}?mode=ro"
            target.execute("PRAGMA trusted_schema = OFF")
            target.execute("ATTACH ? AS source", (where,))
            _check_tables(target)
            with target:  # one transaction: a reader sees all of it or nothing
                last = self._copy_rows(target, source)
                target.execute(HIDE_DEFAULT)
                copied = _metrics_until(target, last)
            source.last, source.copied = last, copied

    def _copy_rows(self, target: sqlite3.Connection, source: Source) -> int:
        for experiment, name in _experiments(target, "source"):
            names = {name: number for number, name in _experiments(target, "main")}
            if name not in names:
                _insert(target, "experiments", f"experiment_id = {experiment}", but="experiment_id")
                names = {name: number for number, name in _experiments(target, "main")}
            kept = f"experiment_id = {experiment}"
            replaced = {"experiment_id": str(names[name])}
            _insert(target, "experiment_tags", kept, replaced)
            _insert(target, "runs", kept, replaced)
            target.execute(
                "INSERT OR IGNORE INTO main.experiment_tags (key, value, experiment_id) "
                "VALUES (?, ?, ?)",
                (*_KIND, names[name]),
            )
        for table in _BY_RUN:
            _clear(target, table)
            _insert(target, table)
        _point_to_artifacts(target, source.path.parent / _ARTIFACTS)
        if _metrics_until(target, source.last) != source.copied:
            _clear(target, "metrics")
            source.last = 0
        (last,) = target.execute("SELECT max(rowid) FROM source.metrics").fetchone()
        _insert(target, "metrics", f"rowid > {source.last} AND rowid <= {last or 0}")
        return last or 0


def _check_tables(target: sqlite3.Connection) -> None:
    """See that the tables to copy are tables: a view is a query of its author's, without an end.

    Raises:
        sqlite3.DatabaseError: one is not.
    """
    wanted = ("experiments", "experiment_tags", "runs", "metrics", *_BY_RUN)
    marks = ", ".join("?" * len(wanted))
    other = target.execute(
        f"SELECT name, type FROM source.sqlite_master WHERE type != 'table' AND name IN ({marks})",
        wanted,
    ).fetchone()
    if other is not None:
        raise sqlite3.DatabaseError(f"{other[0]} is a {other[1]}, not a table")


def _metrics_until(target: sqlite3.Connection, last: int) -> tuple[object, ...]:
    """How many metrics there are up to a row, and that row.

    Taken back, they are fewer; or, where their row numbers are used again, another is the last.
    """
    counted = f"SELECT count(*) FROM source.metrics WHERE rowid <= {last}"
    row = target.execute(f"SELECT * FROM source.metrics WHERE rowid = {last}").fetchone()
    return (*target.execute(counted).fetchone(), row)


def _clear(target: sqlite3.Connection, table: str) -> None:
    """Forget the rows of the source's runs."""
    target.execute(f"DELETE FROM main.{table} WHERE run_uuid IN (SELECT run_uuid FROM source.runs)")


def _insert(
    target: sqlite3.Connection,
    table: str,
    where: str = "1",
    replaced: dict[str, str] | None = None,
    but: str | None = None,
) -> None:
    """Copy rows: the columns that both have, should another version of MLflow have written them."""
    theirs = _columns(target, "source", table)
    columns = [c for c in _columns(target, "main", table) if c in theirs and c != but]
    values = [(replaced or {}).get(column, f'"{column}"') for column in columns]
    names = ", ".join(f'"{column}"' for column in columns)
    target.execute(
        f"INSERT OR REPLACE INTO main.{table} ({names}) "
        f"SELECT {', '.join(values)} FROM source.{table} WHERE {where}"
    )


def _columns(target: sqlite3.Connection, schema: str, table: str) -> list[str]:
    return [row[1] for row in target.execute(f"PRAGMA {schema}.table_info({table})")]


def _experiments(target: sqlite3.Connection, schema: str) -> list[tuple[int, str]]:
    """Number and name of the experiments that have runs, or of all here."""
    query = f"SELECT experiment_id, name FROM {schema}.experiments"
    if schema != "main":
        query += f" WHERE experiment_id IN (SELECT experiment_id FROM {schema}.runs)"
    # A column of sqlite holds what it is given, and these become parts of queries.
    return [(int(number), str(name)) for number, name in target.execute(query).fetchall()]


def _point_to_artifacts(target: sqlite3.Connection, folder: Path) -> None:
    """Files of a run whose folder was moved or copied are where the folder is now."""
    for (run,) in target.execute("SELECT run_uuid FROM source.runs").fetchall():
        files = folder / run / "artifacts"
        if files.is_dir():
            target.execute(
                "UPDATE main.runs SET artifact_uri = ? WHERE run_uuid = ?",
                (files.resolve().as_uri(), run),
            )


def database_bytes(path: Path) -> int:
    """What a database takes, with its log."""
    return sum(size for _time, size in _state(path))


def _state(path: Path) -> tuple[tuple[int, int], ...]:
    """What changes when a database is written, its write-ahead log included."""
    files = (path, path.with_name(path.name + "-wal"))
    return tuple((s.st_mtime_ns, s.st_size) for s in (f.stat() for f in files if f.is_file()))
