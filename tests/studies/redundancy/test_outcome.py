"""What records say: made-up losses with known answers."""

from __future__ import annotations

import math

import pytest

from keel_megatron.errors import UserError
from keel_megatron.studies.redundancy.outcome import outcome
from tests.studies.redundancy.made_up import ADDED, made_up, records_of, subject_of


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
