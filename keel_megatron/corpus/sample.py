"""A seeded sample of the training text, over all sources."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from keel_megatron.corpus import readers
from keel_megatron.corpus.documents import Source, SourceFile, Unit
from keel_megatron.corpus.split import key_hash
from keel_megatron.corpus.tokenize import text_of
from keel_megatron.errors import UserError

_UNIT: Final = 1 << 20
"""Bytes that are read at one place."""
_PLACES: Final = 16
"""Places of a source from which a sample comes, at least, if it has so many."""
_LARGEST_CHARACTER: Final = 4


@dataclass(frozen=True)
class Sampled:
    """A source, and what of it is held out."""

    source: Source
    limit: int
    """Documents with a smaller `split.key_hash` are held out."""
    stop: int | None
    """Of a single plain text: byte offset of its validation part."""
    on_bad: Callable[[readers.BadRecord], None] = lambda _record: None
    """Called with damaged and blank records, maybe several times with the same."""


def training_text(
    sources: Iterable[Sampled], budget: int, seed: int = 0
) -> Iterator[Iterable[str]]:
    """Documents of the training set as chunks: all, if they fit, else a sample of all sources.

    A sample takes from each source in proportion to its bytes. Damaged and blank records are left
    out.

    Args:
        sources: the sources.
        budget: number of characters, about.
        seed: of the sample.

    Raises:
        UserError: a file cannot be read, or changed.
    """
    sources = [item for item in sources if item.source.kind != "megatron"]
    total = sum(item.source.size for item in sources)
    if total <= _LARGEST_CHARACTER * budget and _fits(sources, budget):
        for item in sources:
            for unit in _all_units(item):
                yield from _documents(item, unit)
        return
    for item in sources:
        quota = max(1, budget * item.source.size // total)
        yield from _sample(item, quota, random.Random(f"{seed}/{item.source.name}"))


def _fits(sources: Iterable[Sampled], budget: int) -> bool:
    """Whether all training text is within the budget."""
    for item in sources:
        for unit in _all_units(item):
            for document in _documents(item, unit):
                budget -= sum(map(len, document))
                if budget < 0:
                    return False
    return True


def _all_units(item: Sampled) -> Iterator[Unit]:
    for file in item.source.files:
        if file.part == "both":
            yield from _whole(item, file)


def _whole(item: Sampled, file: SourceFile) -> Iterable[Unit]:
    """The units of a file, as large as they can be."""
    if file.kind == "text":
        return [Unit(file, 0, file.size if item.stop is None else item.stop)]
    return readers.units(file, max(file.size, 1))


def _documents(item: Sampled, unit: Unit) -> Iterator[Iterable[str]]:
    """The training documents of a unit."""
    if unit.file.kind == "text" and not unit.file.compression:
        if key_hash(unit.file.name) >= item.limit:
            yield _readable(unit)
        return
    for document in readers.read(unit, item.on_bad):
        if key_hash(document.key) >= item.limit:
            yield document.chunks


def _readable(unit: Unit) -> Iterator[str]:
    """The text of a unit; nothing more from where it is not UTF-8, which a job reports."""
    try:
        yield from text_of(unit)
    except UserError:
        return


def _sample(item: Sampled, quota: int, numbers: random.Random) -> Iterator[Iterable[str]]:
    """About `quota` characters of a source, from random places in order."""
    files = [file for file in item.source.files if file.part == "both" and file.size]
    ends = list(accumulate(file.size for file in files))
    left = quota
    seen: set[tuple[int, int]] = set()
    for _ in range(8 * max(_PLACES, quota // _UNIT) + 8 * _PLACES):
        number = bisect_right(ends, numbers.randrange(ends[-1]))
        unit = _random_unit(item, files[number], numbers)
        if unit is None or (number, unit.start) in seen:
            continue
        seen.add((number, unit.start))
        share = files[number].size if unit.file.compression else min(_UNIT, files[number].size)
        most = max(quota // _PLACES, 2 * quota * share // ends[-1])
        for document in _documents(item, unit):
            taken = "".join(_first(document, min(left, most)))
            yield (taken,)
            left -= len(taken)
            most -= len(taken)
            if left <= 0:
                return
            if most <= 0:
                break


def _random_unit(item: Sampled, file: SourceFile, numbers: random.Random) -> Unit | None:
    """A random part of a file."""
    if file.kind != "text" or file.compression:
        units = readers.units(file, _UNIT)
        return numbers.choice(units) if units else None
    stop = file.size if item.stop is None else item.stop
    if stop <= _UNIT:
        return Unit(file, 0, stop)
    # Both ends at the beginnings of characters.
    start = _character(file, numbers.randrange(0, stop - _UNIT + 1))
    return Unit(file, start, min(_character(file, start + _UNIT), stop))


def _character(file: SourceFile, at: int) -> int:
    """The first offset from `at` on where a character begins."""
    if at <= 0:
        return 0
    with file.path.open("rb") as stream:
        stream.seek(at)
        head = stream.read(4)
    return at + next((i for i, byte in enumerate(head) if byte & 0xC0 != 0x80), 0)


def _first(chunks: Iterable[str], characters: int) -> Iterator[str]:
    """The first characters of a text."""
    for chunk in chunks:
        if characters <= 0:
            return
        yield chunk[:characters]
        characters -= len(chunk)
