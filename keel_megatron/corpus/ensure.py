"""The dataset folder of a run: found, or built in the process that asks first."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from keel_megatron.config.data import DataConfig
from keel_megatron.config.reading import LARGE, parse_json, read_small
from keel_megatron.config.run import RunConfig
from keel_megatron.corpus.build import Execute, Identified, build, identify, local, partial_of
from keel_megatron.corpus.find import check_buildable
from keel_megatron.corpus.paths import failed
from keel_megatron.data.identity import ANOTHER_RUN
from keel_megatron.data.manifest import MANIFEST, SOURCES
from keel_megatron.errors import UserError
from keel_megatron.runtime.locks import locked as locked_file

Say = Callable[[str], None]

_SHOWN: Final = 5


def ensure_dataset(
    config: RunConfig, say: Say, expected: dict[str, Any] | None = None, *, may_build: bool
) -> Path:
    """The run's dataset folder; built if it is missing. Imports no torch.

    Of several processes of a machine, the first builds and the others wait.

    Args:
        config: the run; its `data` section matters.
        say: called with messages and progress.
        expected: the identity in the run's newest checkpoint; other data is refused before it is
            built.
        may_build: whether this process may build: not of a run on several machines, nor to look
            at a dataset.

    Raises:
        UserError: the data, tokenizer or cache does not fit the settings or the expected identity,
            or the dataset is missing and may not be built.
    """
    data, say = config.data, _tolerant(say)
    if data.dataset is not None:
        if not (data.dataset / MANIFEST).is_file():
            check_buildable(data)
            raise UserError(
                f"data.dataset: {data.dataset} is not a dataset folder; build it with keel data "
                f"build CONFIG --out {shlex.quote(str(data.dataset))}"
            )
        return data.dataset
    found = identify(data, say)
    if expected:
        refuse_other(expected, found, data)
    folder = folder_of(data, found.fingerprint)
    if is_complete(folder, found.fingerprint):
        say(f"using the dataset in {folder}")
        return folder
    if not may_build or data.build == "never":
        why = "which keel train builds on one machine only"
        if data.build == "never":
            why = "and data.build is never"
        raise UserError(
            f"data: there is no dataset of these sources in {data.cache_dir}, {why}; build it "
            "first: keel data build CONFIG"
        )
    with locked(folder, say):
        if is_complete(folder, found.fingerprint):
            say(f"using the dataset in {folder}")
        else:
            build(data, found, folder, say, local())
    return folder


def build_dataset(data: DataConfig, say: Say, out: Path | None, execute: Execute) -> Path:
    """Build the dataset of the settings, unless it is there; for `keel data build`.

    Args:
        data: the run's data settings.
        say: called with messages and progress.
        out: the dataset folder; None: data.dataset, else the one in data.cache_dir.
        execute: does the jobs.

    Returns:
        The folder, which an executor may leave to be finished later.

    Raises:
        UserError: as in `ensure_dataset`, or `out` is another folder.
    """
    say = _tolerant(say)
    if out is None and data.dataset is not None and (data.dataset / MANIFEST).is_file():
        try:
            check_buildable(data)
        except UserError:  # nothing to build or to compare it with
            say(f"the dataset is in {data.dataset}")
            return data.dataset
    found = identify(data, say)
    folder = out or data.dataset or folder_of(data, found.fingerprint)
    setting = "--out" if out else "data.dataset" if data.dataset else "data.cache_dir"
    with locked(folder, say, setting):
        if is_complete(folder, found.fingerprint):
            say(f"the dataset is in {folder}")
            return folder
        if folder.exists() and any(folder.iterdir()):
            raise UserError(
                f"{folder} exists and is not the dataset of these sources; remove it, or give "
                "another --out"
            )
        built = build(data, found, folder, say, execute)
    return folder if built is not None else partial_of(folder)


def folder_of(data: DataConfig, fingerprint: str) -> Path:
    """The folder in data.cache_dir of the dataset with this fingerprint."""
    return data.cache_dir / fingerprint[:16]


def is_complete(folder: Path, fingerprint: str) -> bool:
    """Whether a folder is the dataset with this fingerprint."""
    manifest = folder / MANIFEST
    if folder.is_symlink() or manifest.is_symlink():
        return False
    try:
        content = parse_json(read_small(manifest, LARGE))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("fingerprint") == fingerprint


@contextmanager
def locked(folder: Path, say: Say, setting: str = "data.cache_dir") -> Iterator[None]:
    """Hold the lock of a dataset folder; later processes wait, and say that they do.

    Args:
        folder: the dataset folder.
        say: called with a message.
        setting: where the folder is given, for errors.

    Raises:
        UserError: the folder beside which it is, or a file in it, cannot be written; or a file
            cannot be read within the block.
    """
    parent = folder.parent

    def waiting() -> None:
        say(f"waiting for another process that builds {folder}")

    with ExitStack() as stack:
        try:
            parent.mkdir(parents=True, exist_ok=True)
            path = parent / f".{folder.name}.lock"
            has_locks = stack.enter_context(locked_file(path, waiting))
        except OSError as error:
            raise UserError(
                f"{setting}: cannot write {error.filename or parent}: {error.strerror}"
            ) from error
        if not has_locks:
            say(f"{parent} is on a file system without locks; build {folder} on one machine only")
        try:
            yield
        except OSError as error:
            raise failed(error, folder, partial_of(folder), setting=setting) from error


def refuse_other(expected: dict[str, Any], found: Identified, data: DataConfig) -> None:
    """Refuse sources or a tokenizer other than those of the run's previous training.

    Args:
        expected: the identity in the checkpoint.
        found: the current sources.
        data: the run's data settings.

    Raises:
        UserError: they differ.
    """
    if expected.get("fingerprint") == found.fingerprint:
        return
    raise UserError(
        "data: not the data that the run was trained on: "
        f"{_difference(expected, found, data)}. A run resumes only with the same data (its path "
        f"may change): restore it, or, on the new data, {ANOTHER_RUN}"
    )


def _difference(expected: dict[str, Any], found: Identified, data: DataConfig) -> str:
    """What differs, by the list of the files of then."""
    then = str(expected.get("fingerprint"))
    short = f"fingerprint {then[:12]} then, {found.fingerprint[:12]} now"
    try:
        before = _files(parse_json(read_small(folder_of(data, then) / SOURCES, LARGE)))
    except (OSError, ValueError, AttributeError, TypeError):
        return short
    if found.contents is None:
        return short
    now = _files(found.contents)
    lines = [f"{name} is missing" for name in before.keys() - now.keys()]
    lines += [f"{name} is new" for name in now.keys() - before.keys()]
    lines += [
        f"{name} changed ({before[name][0]} bytes then, {now[name][0]} now)"
        for name in before.keys() & now.keys()
        if before[name] != now[name]
    ]
    if not lines:
        return f"other settings or another data.tokenizer ({short})"
    lines.sort()
    more = f" and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return ", ".join(lines[:_SHOWN]) + more


def _files(contents: dict[str, dict[str, list[Any]]]) -> dict[str, list[Any]]:
    """Size and hash of all files, by name; with several sources by source and name."""
    if len(contents) == 1:
        return next(iter(contents.values()))
    return {
        f"{source}/{name}": r for source, files in contents.items() for name, r in files.items()
    }


def _tolerant(say: Say) -> Say:
    """A `say` that ignores a closed output."""

    def tolerant(text: str) -> None:
        with suppress(OSError):
            say(text)

    return tolerant
