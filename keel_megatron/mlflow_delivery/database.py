"""The SQLite database that all runs of a folder share: runs_dir/mlflow.db.

    runs/mlflow.db               every run's points, parameters, notes and tags
    runs/mlflow_artifacts/ID     a link to RUN/mlflow_artifacts/ID, where the run keeps its files
    runs/mlflow.db.lock          held while the database is created or upgraded

It is an ordinary MLflow database: `mlflow ui --backend-store-uri sqlite:///runs/mlflow.db` shows
it. Only MLflow's own interface writes to it. On a local disk it uses SQLite's write-ahead log, so
that readers and writers do not block each other. Network file systems do not support that log;
there the journal is SQLite's default.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from keel_megatron.errors import UserError
from keel_megatron.mlflow_delivery.client import open_client
from keel_megatron.mlflow_delivery.filesystem import network_filesystem
from keel_megatron.mlflow_delivery.sqlite_uri import sqlite_uri

NAME = "mlflow.db"
ARTIFACTS = "mlflow_artifacts"
DEFAULT_EXPERIMENT = "Default"
_PARTS = ("", "-wal", "-shm")
_OUT_OF_DATE = "out-of-date database schema"


class DatabaseError(UserError):
    """The database belongs to another user, or cannot be used."""


def database_of(run: Path) -> Path:
    """The database of a run's folder: beside the folder, wherever a link to it leads."""
    return Path(os.path.abspath(run)).parent.resolve() / NAME


def local_uri(run: Path) -> str:
    """The tracking URI of that database."""
    return sqlite_uri(database_of(run))


def artifacts_uri(database: Path) -> str:
    """Location of the database's experiments' files for MLflow, whose default is ./mlruns."""
    return (database.parent.resolve() / ARTIFACTS).as_uri()


def local_artifacts(run: Path) -> Path:
    """Where a run's folder keeps the files of its MLflow runs."""
    return run.resolve() / ARTIFACTS


def why_foreign(database: Path) -> str | None:
    """Why a database is not written: it is a link, not a regular file, or another user's.

    None if it is this user's, or if there is none yet.
    """
    try:
        found = os.lstat(database)
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if not stat.S_ISREG(found.st_mode):
        return "is a link" if stat.S_ISLNK(found.st_mode) else "is not a regular file"
    if found.st_uid != os.geteuid():
        return f"belongs to another user (id {found.st_uid})"
    return None


def prepare(database: Path) -> None:
    """Create the database if there is none, and upgrade its tables to the installed MLflow.

    Several processes may do this at once. The file is readable and writable only for its user
    (0600). Before an upgrade the database is copied to mlflow.db.before_upgrade.

    Raises:
        DatabaseError: it is not this user's.
        OSError: the folder cannot be written.
        mlflow.exceptions.MlflowException: its tables are of a newer MLflow.
    """
    problem = why_foreign(database)
    if problem is not None:
        raise DatabaseError(
            f"{database} {problem}: set training.runs_dir to a folder of your own, or tracking.uri"
        )
    if not database.exists():
        with _locked(database):
            if not database.exists():
                _create(database)
    try:
        _open(database)
    except Exception as error:
        if _OUT_OF_DATE not in str(error):
            raise
        with _locked(database):
            _open_upgraded(database)  # another process may have been first


def copy_foreign(database: Path, to: Path) -> None:
    """Copy another user's database for reading, and upgrade the copy's tables.

    Args:
        database: the original, which is only read.
        to: the copy; its folder is private.

    Raises:
        DatabaseError: it cannot be read, or contains views or virtual tables.
    """
    try:
        for part in _PARTS[:2]:
            source = database.with_name(database.name + part)
            if part and not source.exists():
                continue
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
            with os.fdopen(os.open(source, flags), "rb") as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise DatabaseError(f"{source} is not a regular file")
                with to.with_name(to.name + part).open("wb") as copy:
                    shutil.copyfileobj(file, copy, 1 << 20)
        _check_tables(to)
        _open_upgraded(to)
    except DatabaseError:
        raise
    except Exception as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise DatabaseError(f"{database} cannot be read: {why}") from error


def link_artifacts(run: Path, run_id: str) -> None:
    """Link the database's location for the files of an MLflow run to the run's own folder.

    MLflow derives a run's location from its experiment. The link is relative, so that the folder of
    runs can be moved as a whole, and is recreated at every start, so that a run's folder can be
    moved.
    On a file system without links, files are in the run's folder only.
    """
    place = database_of(run).parent / ARTIFACTS
    wanted = os.path.join("..", Path(os.path.abspath(run)).name, ARTIFACTS, run_id)
    link = place / run_id
    if place.is_symlink():  # the user's own link
        return
    with suppress(OSError):
        place.mkdir(mode=0o700, exist_ok=True)
        if link.is_symlink():
            if os.readlink(link) == wanted:
                return
            link.unlink()
        link.symlink_to(wanted)


def _open(database: Path) -> Any:
    """A client that has seen that the tables are those of the installed MLflow."""
    client = open_client(sqlite_uri(database))
    client.search_experiments(max_results=1)
    return client


def _open_upgraded(database: Path) -> None:
    try:
        _open(database)
    except Exception as error:
        if _OUT_OF_DATE not in str(error):
            raise
        _upgrade(database)
        _open(database)


def _create(database: Path) -> None:
    """Create the complete database under a temporary name; the caller holds the lock.

    MLflow creates its tables in dozens of steps. If it is killed between them, it can neither use
    nor complete the file.
    """
    for left in database.parent.glob(f"{database.name}.*.partial*"):
        left.unlink(missing_ok=True)
    # A name of its own each time: MLflow remembers within a process what it has made where.
    made, whole = (
        database.with_name(f"{database.name}.{uuid.uuid4().hex}.partial") for _ in range(2)
    )
    for file in (made, whole):
        _touch(file)
    make_tables(made)
    journal = "DELETE" if network_filesystem(database.parent) else "WAL"
    # Not the file itself, which MLflow's engine still has open.
    with closing(sqlite3.connect(made)) as source, closing(sqlite3.connect(whole)) as copy:
        source.backup(copy)
        copy.execute(f"PRAGMA journal_mode = {journal}")
    try:
        os.link(whole, database)  # where locks do not work, the first one stays
    except FileExistsError:
        pass
    except OSError:  # nor hard links
        whole.replace(database)
    for file in (made, whole):
        file.unlink(missing_ok=True)


def make_tables(file: Path) -> None:
    """Fill an empty file with MLflow's tables, and hide the empty experiment that it adds."""
    client = _open(file)
    client.delete_experiment(client.get_experiment_by_name(DEFAULT_EXPERIMENT).experiment_id)


def _touch(file: Path) -> None:
    os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))


def _upgrade(database: Path) -> None:
    """Copy the database and upgrade its tables; the caller holds the lock.

    Raises:
        DatabaseError: MLflow cannot.
    """
    kept = database.with_name(f"{database.name}.before_upgrade")
    kept.unlink(missing_ok=True)
    _touch(kept)
    with closing(sqlite3.connect(database)) as source, closing(sqlite3.connect(kept)) as copy:
        source.backup(copy)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "mlflow", "db", "upgrade", sqlite_uri(database)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise DatabaseError(f"`mlflow db upgrade` fails for {database}: {lines[-1]}")


def _check_tables(database: Path) -> None:
    """Refuse views and virtual tables in another user's database: they could be endless queries.

    Raises:
        DatabaseError: one is not.
    """
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA trusted_schema = OFF")
        other = connection.execute(
            "SELECT name, type FROM sqlite_master "
            "WHERE type = 'view' OR sql LIKE 'CREATE VIRTUAL%' ORDER BY name"
        ).fetchone()
    if other is not None:
        raise DatabaseError(f"{other[0]} is a {other[1]}, not a table")


@contextmanager
def _locked(database: Path) -> Iterator[None]:
    """Hold the database's lock; the system frees that of a process which dies."""
    path = database.with_name(f"{database.name}.lock")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
