"""Made-up records with known answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from keel_megatron.studies.redundancy.outcome import Outcome, outcome
from keel_megatron.studies.redundancy.records import Records, Subject
from keel_megatron.studies.redundancy.units import NOTHING
from keel_megatron.studies.redundancy.walk import Found

ADDED = [3.0, 0.5, 0.0099, 0.0100, 0.015, 0.021, -0.1, 0.0]


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


def made_up(**changes: Any) -> Outcome:
    subject = subject_of(**changes)
    return outcome(subject, records_of(subject, ADDED))
