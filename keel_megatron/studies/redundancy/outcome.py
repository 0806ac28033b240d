"""What the records of a run say: the loss that each unit's removal adds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keel_megatron.errors import UserError
from keel_megatron.studies.redundancy import records
from keel_megatron.studies.redundancy.records import Records, Subject

CHEAP = 0.01
"""A removal is cheap if it raises the perplexity, or the loss, by less than this part of it."""
CHEAP_LOSS = math.log1p(CHEAP)
"""Nats that raise the perplexity by that part: exp(CHEAP_LOSS) - 1 = CHEAP."""


@dataclass(frozen=True)
class Outcome:
    """The results of one run."""

    subject: Subject
    loss: float
    """Of the whole model, nats per token."""
    added: NDArray[np.float64]
    """What each unit's removal adds to it; infinite where the loss is not finite."""
    errors: NDArray[np.float64]
    """Standard error of each, over the sequences; NaN with one sequence."""
    angles: NDArray[np.float64]
    """Mean angular distance of the streams before and after each unit (`walk`)."""

    @property
    def label(self) -> str:
        """Rule and depth."""
        return f"{self.subject.residual}, {self.subject.sub_layers} sub-layers"

    @property
    def perplexity(self) -> float:
        """Of the whole model."""
        return _exp(self.loss)

    @property
    def added_perplexity(self) -> list[float]:
        """What each unit's removal adds to it."""
        return [_exp(self.loss + one) - self.perplexity for one in self.added.tolist()]

    @property
    def cheap(self) -> float:
        """Share of the units whose removal raises the perplexity by less than `CHEAP`."""
        return float((self.added < CHEAP_LOSS).mean())

    @property
    def cheap_in_loss(self) -> float:
        """Share of the units whose removal raises the loss by less than `CHEAP`."""
        return float((self.added < CHEAP * self.loss).mean())

    @property
    def error(self) -> float:
        """The median standard error; 0 if it is not known, with one sequence."""
        known = self.errors[np.isfinite(self.errors)]
        return float(np.median(known)) if known.size else 0.0

    @property
    def depths(self) -> NDArray[np.float64]:
        """Relative depth of each unit's middle, from 0 to 1."""
        return (np.arange(len(self.added)) + 0.5) / len(self.added)

    def quarters(self) -> list[float]:
        """Median of what a removal adds to the loss, in each quarter of the depth."""
        return [float(np.median(part)) for part in np.array_split(self.added, 4)]

    def row(self) -> dict[str, Any]:
        """For results.json."""
        subject = self.subject
        return {
            "run": subject.run,
            "folder": subject.folder,
            "step": subject.step,
            "residual": subject.residual,
            "sub_layers": subject.sub_layers,
            "unit": subject.unit,
            "removal": subject.removal,
            "text": subject.text,
            "text_sha256": subject.digest,
            "sequences": subject.sequences,
            "tokens": subject.sequences * subject.length,
            "loss": self.loss,
            "perplexity": self.perplexity,
            "cheap_share_perplexity": self.cheap,
            "cheap_share_loss": self.cheap_in_loss,
            "added_loss": self.added.tolist(),
            "added_loss_standard_error": self.errors.tolist(),
            "added_perplexity": self.added_perplexity,
            "angular_distance": self.angles.tolist(),
        }


def outcome(subject: Subject, found: Records) -> Outcome:
    """Evaluate complete records.

    Raises:
        UserError: they are not complete, or the whole model's loss is not finite.
    """
    if not found.done.all():
        raise UserError(f"{subject.folder}: only {found.done.mean():.0%} of it has been measured")
    weights = np.asarray(subject.weights)
    losses = np.where(np.isfinite(found.losses), found.losses, np.inf)
    whole = losses[-1] * weights
    loss = float(whole.sum())
    if not math.isfinite(loss):
        raise UserError(
            f"{subject.folder}: the loss is not finite: its training has diverged; use an earlier "
            "checkpoint, --step N"
        )
    differences = losses[:-1] * weights - whole
    added = differences.sum(axis=1)
    # Sequences count by their tokens that count, alike in most texts; sum of n terms.
    n, parts = len(weights), weights / weights.sum()
    with np.errstate(invalid="ignore"):
        squares = np.square(differences - added[:, None] * parts).sum(axis=1)
    errors = np.sqrt(squares * n / (n - 1)) if n > 1 else np.full(len(added), np.nan)
    parts_of_pi = found.angles[:-1].mean(axis=1)
    return Outcome(subject, loss, added, errors, parts_of_pi)


def outcomes(subjects: list[Subject], out: Path) -> list[Outcome]:
    """The outcomes of runs whose records are complete.

    Raises:
        UserError: as in `outcome`.
    """
    return [outcome(one, records.read(one.file(out), one)) for one in subjects]


def different_texts(found: list[Outcome]) -> str | None:
    """That the runs were measured on different tokens, if they were."""
    texts = {one.subject.digest for one in found}
    if len(texts) < 2:
        return None
    return (
        "The runs were measured on different tokens: compare what a removal adds with the run's "
        "own loss only."
    )


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
