"""How a build is divided into jobs, each of which writes the tokens of a part of the text.

The division depends on the sources' content alone, not on the number of workers or tasks: so does
the order of documents, and a build that was interrupted resumes with another number of workers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field, ValidationError

from keel_megatron.config.reading import LARGE, lines_of, open_regular, parse_json, read_small
from keel_megatron.config.section import Section
from keel_megatron.corpus import readers
from keel_megatron.corpus.cuts import Cuts, first_safe
from keel_megatron.corpus.documents import Kind, Source, SourceFile, Unit
from keel_megatron.corpus.readers.streams import blocks
from keel_megatron.corpus.split import is_single_text, key_hash, split_offset
from keel_megatron.data.manifest import TokenizerRecord
from keel_megatron.errors import UserError
from keel_megatron.runtime.files import write_whole

PLAN: Final = "plan.json"
JOBS: Final = "jobs"
SAID: Final = "build.log"
SMALLEST_JOB: Final = 16 << 20
"""Bytes of source files of one job, at least; more for large sources."""
COST_OF_FILE: Final = 1 << 14
"""Bytes that take as long as opening a file."""
MOST_JOBS: Final = 1024
"""Jobs of one source, about."""
_KINDS: Final[dict[Kind, Literal["tokens", "conversations"]]] = {
    "megatron": "tokens",
    "chat": "conversations",
}
_WINDOW: Final = 1 << 20
"""A safe place to cut a large text is looked for in this many bytes."""


class Job(Section):
    """A part of a source that one worker tokenizes."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    source: int = Field(ge=0)
    """Number of its source."""
    shard: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Name of the shard that it belongs to; only parts of a text share one."""
    kind: Literal["documents", "part", "tokens", "conversations"]
    """documents: whole documents. part: a range of one text. tokens: ready ones, used in place."""
    ends: bool = True
    """Of a part: whether its document ends with it."""
    held_out: bool = False
    """Of a part: whether its document is held out."""
    validation: bool = False
    """Whether it belongs to the source's own validation set."""
    bytes: int
    """Of source files, about."""
    cost: int
    """The same, with COST_OF_FILE for each file."""


class PlannedSource(Section):
    """What jobs need to know about a source."""

    name: str
    setting: str
    limit: int
    """Documents with a smaller `split.key_hash` are held out."""


class Plan(Section):
    """Content of plan.json."""

    fingerprint: str
    tokenizer: TokenizerRecord
    chat_template: str | None = None
    """SHA-256 of chat_template.jinja in the folder."""
    encoder: str
    """What encodes: `encoders.Choice.name`."""
    proven_cuts: bool
    """Whether documents can be cut without changing their tokens."""
    on_bad_record: Literal["stop", "skip"]
    sources: tuple[PlannedSource, ...]
    jobs: tuple[Job, ...]
    unsafe_cuts: int
    """Cuts between parts of a text that may have changed tokens."""


@dataclass
class _Group:
    """Units of one shard."""

    units: list[Unit] = field(default_factory=list)
    bytes: int = 0

    @property
    def cost(self) -> int:
        """Bytes, with COST_OF_FILE for each unit."""
        return self.bytes + COST_OF_FILE * len(self.units)


@dataclass(frozen=True)
class _Planned:
    """A job and its units."""

    job: Job
    units: list[Unit]


def job_size(source: Source) -> int:
    """Bytes of source files of one job."""
    return max(SMALLEST_JOB, (source.size + COST_OF_FILE * len(source.files)) // MOST_JOBS)


class Planner:
    """Divides sources into jobs, and writes each job's units to the folder.

    Args:
        folder: the folder that is being built.
        cuts: where a text can be cut.
        fraction: `data.validation_fraction`.
    """

    def __init__(self, folder: Path, cuts: Cuts, fraction: float) -> None:
        self._folder = folder / JOBS
        self._cuts = cuts
        self._fraction = fraction
        self.jobs: list[Job] = []
        self.unsafe = 0

    def add(self, number: int, source: Source, limit: int) -> None:
        """Plan a source.

        Raises:
            UserError: a file cannot be read.
            OSError: the folder cannot be written.
        """
        self._folder.mkdir(exist_ok=True)
        for shards, group in enumerate(self._groups(source, job_size(source))):
            shard = f"{source.name}-{shards:05}"
            for part, planned in enumerate(self._jobs(group, shard, number, source, limit)):
                name = shard if planned.job.kind != "part" else f"{shard}.{part:05}"
                self._write(planned.job.model_copy(update={"name": name}), planned.units)

    def _write(self, job: Job, units: list[Unit]) -> None:
        self.jobs.append(job)
        lines = (json.dumps({**asdict(u.file), "start": u.start, "stop": u.stop}) for u in units)
        write_whole(units_path(self._folder.parent, job), "".join(f"{line}\n" for line in lines))

    def _jobs(
        self, group: _Group, shard: str, number: int, source: Source, limit: int
    ) -> Iterator[_Planned]:
        """The jobs of one shard."""
        file = group.units[0].file
        job = Job(
            name=shard,
            source=number,
            shard=shard,
            kind=_KINDS.get(file.kind, "documents"),
            validation=file.part == "validation",
            bytes=group.bytes,
            cost=group.cost,
        )
        size = job_size(source)
        if not (is_single_text(source) or _is_large_text(file, size)):
            yield _Planned(job, group.units)
            return
        held_out = not job.validation and key_hash(file.name) < limit
        ranges = [(0, file.size, held_out)]
        if is_single_text(source):
            at = split_offset(file, self._fraction)
            ranges = [(0, at, False), (at, file.size, True)]
        for start, stop, held in ranges:
            for unit in self._parts(file, start, stop, size):
                length = unit.stop - unit.start
                update = {"kind": "part", "ends": unit.stop == stop, "held_out": held}
                yield _Planned(
                    job.model_copy(update={**update, "bytes": length, "cost": length}), [unit]
                )

    def _parts(self, file: SourceFile, start: int, stop: int, size: int) -> Iterator[Unit]:
        """A range of a text in parts of about `size` bytes, cut where tokens do not change."""
        while stop - start > 1.5 * size:
            at = self._cut(file, start + size)
            if at >= stop:
                break
            yield Unit(file, start, at)
            start = at
        yield Unit(file, start, stop)

    def _cut(self, file: SourceFile, at: int) -> int:
        """The first byte offset from `at` on at which the text can be cut."""
        window = b"".join(blocks(file, at, min(at + _WINDOW, file.size)))
        begin = next((i for i, byte in enumerate(window[:4]) if byte & 0xC0 != 0x80), 0)
        text = window[begin:].decode("utf-8", "ignore")
        place = first_safe(self._cuts, text, 0, len(text))
        if place is None:
            self.unsafe += 1
            place = 0
        return at + begin + len(text[:place].encode())

    def _groups(self, source: Source, size: int) -> Iterator[_Group]:
        """The units of each shard, in order."""
        group = _Group()
        for unit, share in _units(source, size):
            alone = unit.file.kind == "megatron" or _is_large_text(unit.file, size)
            full = alone or group.cost + COST_OF_FILE + share > size
            if group.units and (full or group.units[0].file.part != unit.file.part):
                yield group
                group = _Group()
            group.units.append(unit)
            group.bytes += share
            if alone:
                yield group
                group = _Group()
        if group.units:
            yield group


def read_plan(folder: Path) -> Plan:
    """Read a folder's plan.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.
    """
    return Plan.model_validate_json(read_small(folder / PLAN, LARGE))


def units_path(folder: Path, job: Job) -> Path:
    """The file of a job's units."""
    return folder / JOBS / f"{job.name}.units"


def read_units(folder: Path, job: Job) -> Iterator[Unit]:
    """A job's units, one by one, as there may be a million.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = units_path(folder, job)
    try:
        with open_regular(path) as stream:
            for line in lines_of(stream):
                content: dict[str, Any] = parse_json(line)
                start, stop = content.pop("start"), content.pop("stop")
                yield Unit(SourceFile(**content), start, stop)
    except (OSError, ValueError, TypeError, KeyError, ValidationError) as error:
        raise UserError(
            f"{path} is damaged ({error}); remove {folder} to build it again"
        ) from error


def _units(source: Source, size: int) -> Iterator[tuple[Unit, int]]:
    """The units of a source, with bytes: whole texts, ranges of other files, prefixes."""
    for file in source.files:
        if file.kind == "megatron":
            if file.location.endswith(".bin"):
                yield Unit(file, 0, file.size), file.size
        elif file.kind == "text":
            yield Unit(file, 0, file.size), file.size
        else:
            found = readers.units(file, size)
            for unit in found:  # of rows, as if all were equally long
                yield unit, file.size * (unit.stop - unit.start) // max(1, found[-1].stop)


def _is_large_text(file: SourceFile, size: int) -> bool:
    return file.kind == "text" and not file.compression and file.size > 1.5 * size
