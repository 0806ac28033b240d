"""What has been measured is read back, and what cannot be read is measured again."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from keel_megatron.errors import UserError
from keel_megatron.studies.redundancy.outcome import outcome
from keel_megatron.studies.redundancy.records import heading, line, read
from keel_megatron.studies.redundancy.units import NOTHING
from keel_megatron.studies.redundancy.walk import Found
from tests.studies.redundancy.made_up import subject_of


def test_records_are_read_back(tmp_path: Path) -> None:
    subject = subject_of()
    path = tmp_path / "records.jsonl"
    results = [
        (0, Found(2, [1.0, 2.0], [0.5, 0.25])),
        (2, Found(NOTHING, [3.0, math.inf], [])),
        (2, Found(99, [3.0, 4.0], [0.0, 0.0])),  # no such unit
    ]
    lines = [heading(subject), *(line(*one) for one in results), '{"first": 0, "unit"']
    path.write_text("\n".join(lines))
    found = read(path, subject)
    assert found.done.sum() == 4
    assert found.losses[2, :2].tolist() == [1.0, 2.0]
    assert found.losses[-1, 2:].tolist() == [3.0, math.inf]
    assert read(tmp_path / "none", subject).done.sum() == 0
    with pytest.raises(UserError, match=r"runs/made-up: only 11% of it has been measured"):
        outcome(subject, found)


def test_another_measurement_is_another_file() -> None:
    paths = {
        subject_of(**changes).file(Path())
        for changes in (
            {},
            {"checkpoint": "e" * 64},
            {"digest": "e" * 64},
            {"unit": "block"},
            {"removal": "branch"},
        )
    }
    assert len(paths) == 5
