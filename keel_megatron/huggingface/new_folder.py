"""A folder that a command writes as a whole, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from keel_megatron.checkpoint.folder import sync
from keel_megatron.errors import UserError


def check_new(out: Path) -> None:
    """See that a folder can be written: it may be empty; OUT.partial must not exist.

    Raises:
        UserError: it cannot.
    """
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise UserError(f"--out: {out} exists and is not an empty folder; name another")
    if os.path.lexists(_partial(out)):
        raise UserError(
            f"--out: {_partial(out)} exists, left by a command that was killed or is still "
            "running; remove it, or name another folder"
        )


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Context that yields OUT.partial to write into; it gets its name at the end.

    An error removes it.

    Raises:
        UserError: it cannot be written.
    """
    partial = _partial(out)
    check_new(out)
    with _writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    try:
        with _writing(out):
            yield partial
            for path in partial.iterdir():
                if path.is_file():
                    _sync_file(path)
            sync(partial)
            if out.is_dir():
                out.rmdir()
            partial.rename(out)
            sync(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_space(folder: Path, out: Path, size: float) -> None:
    """See that so many bytes fit.

    Raises:
        UserError: they do not.
    """
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"--out: {out} needs {size / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free there"
        )


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _sync_file(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written: {error.strerror or error}") from error
