"""What records say: made-up losses with known answers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keel_megatron.errors import UserError
from keel_megatron.studies.redundancy.outcome import Outcome, different_texts, outcome
from keel_megatron.studies.redundancy.records import Records, Subject, heading, line, read
from keel_megatron.studies.redundancy.report import write_report
from keel_megatron.studies.redundancy.units import NOTHING
from keel_megatron.studies.redundancy.walk import Found


def subject_of(**changes: Any) -> Subject:
    """8 units; 4 sequences of 10 tokens."""
    subject = Subject(
        run="made-up",
        folder="runs/made-up",
        step=3,
        checkpoint="c" * 64,
        residual="keel",
        sub_layers=8,
        unit="sub-layer",
        removal="sub-layer",
        text="nothing",
        digest="d" * 64,
        length=10,
        weights=(1 / 40,) * 4,
    )
    return replace(subject, **changes)


def records_of(subject: Subject, added: list[float], loss: float = 2.0) -> Records:
    """Every removal adds so much per token; half of it to two sequences, 3/2 to the others."""
    records = Records(subject)
    whole = np.full(4, 10 * loss)
    records.add(0, Found(NOTHING, whole.tolist(), []))
    for unit, one in enumerate(added):
        losses = whole + 10 * one * np.array([0.5, 1.5, 0.5, 1.5])
        records.add(0, Found(unit, losses.tolist(), [0.1, 0.2, 0.3, 0.4]))
    return records


ADDED = [3.0, 0.5, 0.0099, 0.0100, 0.015, 0.021, -0.1, 0.0]


def made_up(**changes: Any) -> Outcome:
    subject = subject_of(**changes)
    return outcome(subject, records_of(subject, ADDED))


def test_what_a_removal_adds() -> None:
    found = made_up()
    assert found.loss == pytest.approx(2.0)
    assert found.perplexity == pytest.approx(math.exp(2))
    assert found.added.tolist() == pytest.approx(ADDED)
    assert found.added_perplexity[0] == pytest.approx(math.exp(5) - math.exp(2))
    # Four differences of 0.5 and 1.5: their standard deviation is 1 / sqrt(3), that of the mean
    # half of it.
    assert found.errors[0] == pytest.approx(3.0 * 0.5 / math.sqrt(3))
    assert found.angles.tolist() == pytest.approx([0.25] * 8)
    assert found.quarters() == pytest.approx([1.75, (0.0099 + 0.01) / 2, 0.018, -0.05])


def test_cheap_removals_are_counted_twice() -> None:
    """Below 1 % of the perplexity: ln 1.01 = 0.00995 nats; below 1 % of a loss of 2: 0.02."""
    found = made_up()
    assert found.cheap == 3 / 8
    assert found.cheap_in_loss == 5 / 8


def test_a_loss_that_is_not_finite() -> None:
    subject = subject_of()
    records = records_of(subject, ADDED)
    records.losses[4, 1] = math.nan
    found = outcome(subject, records)
    assert found.added[4] == math.inf
    assert found.cheap == 3 / 8
    records.losses[-1, 0] = math.inf
    with pytest.raises(UserError, match="the loss is not finite: its training has diverged"):
        outcome(subject, records)


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


def test_the_report_has_every_run(tmp_path: Path) -> None:
    found = [made_up(), made_up(residual="pre_ln", digest="e" * 64), made_up(run="second")]
    text = write_report(found, tmp_path)
    assert [row.split(" | ")[1] for row in text.splitlines()[2:5]] == ["keel", "pre_ln", "keel"]
    assert "38% | 62%" in text
    assert str(different_texts(found)) in text
    assert different_texts(found[::2]) is None
    assert text in (tmp_path / "table.md").read_text()
    assert (tmp_path / "redundancy.png").stat().st_size > 20_000
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["run"] for row in rows] == ["made-up", "made-up", "second"]
