"""What has been measured of a model, line by line in a file, so that an interrupted study resumes.

The first line says what is measured. Each further line is one unit removed from the model for some
of the sequences. The file's name has a digest of the first line: another checkpoint, text, unit or
removal is another file, and a finished one is not measured again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keel_megatron.config.reading import lines_of, open_regular
from keel_megatron.studies.redundancy.units import NOTHING, Removal, Unit, count
from keel_megatron.studies.redundancy.walk import Found

FOLDER = "measured"


@dataclass(frozen=True)
class Subject:
    """What is measured."""

    run: str
    """The run's name."""
    folder: str
    """The run's folder, or its checkpoint's, as it was given."""
    step: int
    """The checkpoint's step."""
    checkpoint: str
    """SHA-256 of its manifest, which has a checksum of every file."""
    residual: str
    sub_layers: int
    unit: Unit
    removal: Removal
    text: str
    """Where the sequences are from."""
    digest: str
    """SHA-256 of them."""
    length: int
    """Tokens of each."""
    weights: tuple[float, ...]
    """The loss is the sum of the sequences' summed losses times these."""

    @property
    def units(self) -> int:
        """Units of the model."""
        return count(self.sub_layers, self.unit)

    @property
    def sequences(self) -> int:
        """Sequences that are measured."""
        return len(self.weights)

    def file(self, out: Path) -> Path:
        """The file of its records in the study's folder."""
        key = [self.checkpoint, self.digest, self.unit, self.removal, self.weights]
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
        return out / FOLDER / f"{self.run}-{self.unit}-{self.removal}-{name}.jsonl"


class Records:
    """The results so far.

    Attributes:
        losses: summed loss of each sequence, nats, [units + 1, sequences]; the last row is that of
            the whole model.
        angles: angular distance of the streams before and after each unit, [units + 1, sequences].
        done: which of them have been measured.
    """

    def __init__(self, subject: Subject) -> None:
        shape = (subject.units + 1, subject.sequences)
        self.losses = np.full(shape, np.nan)
        self.angles = np.full(shape, np.nan)
        self.done = np.zeros(shape, dtype=bool)

    def add(self, first: int, found: Found) -> None:
        """Take a result of the sequences from `first` on."""
        place = found.unit, slice(first, first + len(found.losses))
        self.losses[place] = found.losses
        if found.unit != NOTHING:
            self.angles[place] = found.angles
        self.done[place] = True


def line(first: int, found: Found) -> str:
    """A result as a line of the file."""
    return json.dumps({"first": first, **asdict(found)})


def heading(subject: Subject) -> str:
    """The file's first line."""
    return json.dumps(asdict(subject))


def read(path: Path, subject: Subject) -> Records:
    """The records in a file; those that cannot be read are measured again."""
    records = Records(subject)
    for values in _lines(path):
        with suppress(KeyError, TypeError, ValueError, IndexError):
            found = Found(int(values["unit"]), list(values["losses"]), list(values["angles"]))
            first = int(values["first"])
            if NOTHING <= found.unit < subject.units and 0 <= first < subject.sequences:
                records.add(first, found)
    return records


def done(path: Path, subject: Subject) -> NDArray[np.bool_]:
    """Which results a file has, [units + 1, sequences]."""
    return read(path, subject).done


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file, without its first line; empty if there is no file."""
    with suppress(FileNotFoundError), open_regular(path) as stream:
        for number, text in enumerate(lines_of(stream)):
            with suppress(ValueError):
                values = json.loads(text)
                if number and isinstance(values, dict):
                    yield values
