"""Access to the files of MLflow runs, restricted to the shown folders."""

from __future__ import annotations

import math
import mimetypes
import os
import re
import stat
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keel_megatron.dashboard.folders import is_run

ARTIFACTS = "mlflow_artifacts"
"""In a run's folder; in it ID/artifacts for every MLflow run."""
_RESCAN_SECONDS = 2.0
_RUN = re.compile(r"^[0-9a-f]{32}$")
_MOST_LISTED = 10_000
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class ArtifactFolders:
    """The files of MLflow runs.

    The location in the database (`artifact_uri`) is ignored: it may name any folder. Every path is
    opened part by part from its root, and no part may be a link. So only files in the root's folder
    are read, even if links are changed at the same time.

    Args:
        roots: runs' folders.
        folder: the folder of the database; a root, as are the runs' folders in it, including those
            of runs that start later.
    """

    def __init__(self, roots: Sequence[Path], folder: Path | None = None) -> None:
        self._given = [*roots, *([] if folder is None else [folder])]
        self._folder = folder
        self._roots = [root.resolve() / ARTIFACTS for root in self._given]
        self._scanned = -math.inf

    def open(self, run: str, path: str) -> tuple[int, int]:
        """Open a file: a descriptor, which the caller closes, and its size in bytes.

        Raises:
            FileNotFoundError: there is no such file within the run's folder.
        """
        descriptor = self._open(run, path)
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            os.close(descriptor)
            raise FileNotFoundError(path)
        return descriptor, found.st_size

    def list(self, run: str, path: str) -> list[dict[str, Any]]:
        """Content of a run's folder in the format of MLflow's API, without links.

        Raises:
            FileNotFoundError: there is no such folder in the run's folder.
        """
        descriptor = self._open(run, path)
        try:
            if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise FileNotFoundError(path)
            found = []
            with os.scandir(descriptor) as entries:
                for entry in entries:
                    name = f"{path}/{entry.name}" if path else entry.name
                    if entry.is_dir(follow_symlinks=False):
                        found.append({"path": name, "is_dir": True})
                    elif entry.is_file(follow_symlinks=False):
                        size = entry.stat(follow_symlinks=False).st_size
                        found.append({"path": name, "is_dir": False, "file_size": size})
                    if len(found) == _MOST_LISTED:
                        break
        finally:
            os.close(descriptor)
        return sorted(found, key=lambda file: str(file["path"]))

    def _open(self, run: str, path: str) -> int:
        parts = [part for part in path.split("/") if part]
        if not _RUN.match(run) or any(part in (".", "..") or "\0" in part for part in parts):
            raise FileNotFoundError(path)
        while True:
            for root in self._roots:
                try:
                    return _open_inside(root, [run, "artifacts", *parts])
                except (OSError, UnicodeEncodeError):  # it does not exist, or is a link
                    continue
            if not self._scan():
                raise FileNotFoundError(path)

    def _scan(self) -> bool:
        """Find new runs' folders; False if that was done a moment ago."""
        now = time.monotonic()
        if self._folder is None or now < self._scanned + _RESCAN_SECONDS:
            return False
        self._scanned = now
        try:
            runs = [path for path in sorted(self._folder.iterdir()) if is_run(path)]
        except OSError:
            return False
        self._roots = [root.resolve() / ARTIFACTS for root in [*self._given, *runs]]
        return True


def content_type(path: str) -> str:
    """Content type of a file for a browser: never an executable type."""
    kind, _encoding = mimetypes.guess_type(path)
    if kind is not None and (kind.startswith("image/") or kind == "application/json"):
        return kind
    if kind is not None and (kind.startswith("text/") or kind.endswith("xml")):
        return "text/plain; charset=utf-8"
    is_text = path.endswith((".yaml", ".yml", ".jsonl", ".log", ".toml"))
    return "text/plain; charset=utf-8" if is_text else "application/octet-stream"


def _open_inside(root: Path, parts: Sequence[str]) -> int:
    descriptor = os.open(root, _FLAGS)
    for part in parts:
        try:
            inner = os.open(part, _FLAGS, dir_fd=descriptor)
        finally:
            os.close(descriptor)
        descriptor = inner
    return descriptor
