"""Depth profiles: per-sub-layer statistics of a step, as records and as summaries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from keel_megatron.config.nearby import nearby
from keel_megatron.errors import UserError
from keel_megatron.tracking.metric_names import DEPTH
from keel_megatron.tracking.metrics import iterate_metrics
from keel_megatron.tracking.run_log import EARLIER_DEPTH_FILE, METRICS_FILE


@dataclass(frozen=True)
class Quantity:
    """A statistic of every sub-layer."""

    label: str
    scale: Literal["log", "linear"] = "log"
    optional: bool = False
    """Recorded for some runs only."""


QUANTITIES: dict[str, Quantity] = {
    "gradient_norm": Quantity("gradient norm"),
    "gradient_rms": Quantity("RMS of the gradient of matrices", optional=True),
    "stream_rms": Quantity("RMS of the stream"),
    "branch_rms": Quantity("RMS of the branch"),
    "update_cosine": Quantity("cosine of branch and stream", "linear"),
    "update_size": Quantity("size of the branch / skip path"),
    "update_kept": Quantity("cosine of the stored and the exact update", "linear", optional=True),
    "weight_rms": Quantity("RMS of the weights"),
    "update_to_weight": Quantity("size of the update / weights"),
    "outer_gain_mean": Quantity("outer norm weight, mean", "linear"),
    "outer_gain_min": Quantity("outer norm weight, minimum", "linear"),
    "outer_gain_max": Quantity("outer norm weight, maximum", "linear"),
    "inner_gain_mean": Quantity("inner norm weight, mean", "linear"),
    "inner_gain_min": Quantity("inner norm weight, minimum", "linear"),
    "inner_gain_max": Quantity("inner norm weight, maximum", "linear"),
    "branch_gain_mean": Quantity("branch norm weight, mean", "linear", optional=True),
    "branch_gain_min": Quantity("branch norm weight, minimum", "linear", optional=True),
    "branch_gain_max": Quantity("branch norm weight, maximum", "linear", optional=True),
    "attention_logit_max": Quantity("largest attention logit", "linear"),
}
"""With x the stream [s, b, h] before sub-layer l, F its branch's output, x' the stream after it
(of several streams, x and x' are their means):

- gradient_norm: L2 norm of the gradient of the sub-layer's parameters (the branch's and its
  norms'), before clipping;
- gradient_rms: of the elements of the matrices' gradient, before clipping: what AdamW's epsilon
  has to be small against; runs of earlier versions have none;
- stream_rms, branch_rms: of x' and of F, as it is added, over all elements of the global batch;
- update_cosine, update_size: cos(x, F) and |F| / |alpha x| in the sum alpha x + F, means over the
  tokens of the global batch;
- update_kept: cos(x' - x, e - x) with e what x' would be in fp32, mean over the tokens; only with a
  bf16 stream (model.stream);
- weight_rms: of the matrices before the update (norm weights have their own statistics);
- update_to_weight: |W_after - W| / |W| of the matrices, in fp32;
- outer_gain, inner_gain: of the weights of N_out and N_in (or N_in's learned vector), without the
  rule's constant factor of N_in; branch_gain: of N_b's, for rules that have one;
- attention_logit_max: the largest q k / sqrt(d) that a softmax of the global batch saw.
"""

Values = np.ma.MaskedArray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class DepthProfile:
    """Every quantity of every sub-layer at one step."""

    step: int
    """Number of the step; the first is 1."""
    values: Mapping[str, Values]
    """By quantity: fp32 [sub_layers], masked where the quantity does not apply to a sub-layer."""
    missing: frozenset[str] = frozenset()
    """Quantities that were not recorded, because another version wrote the record; masked too."""

    @classmethod
    def of(
        cls, step: int, values: Mapping[str, ArrayLike], absent: Mapping[str, Sequence[bool]]
    ) -> DepthProfile:
        """A profile from arrays.

        Args:
            step: the step.
            values: a quantity's values [sub_layers], anything where it is absent.
            absent: by prefix of a quantity's name, the sub-layers to which it does not apply.
        """

        def mask(name: str) -> Any:
            masks = [mask for start, mask in absent.items() if name.startswith(start)]
            return masks[0] if masks else False

        with np.errstate(over="ignore"):
            arrays = {name: np.asarray(values[name], dtype=np.float32) for name in QUANTITIES}
        return cls(step, {name: np.ma.array(a, mask=mask(name)) for name, a in arrays.items()})

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> DepthProfile:
        """What `to_json` made, also of another version's quantities, and of a line of depth.jsonl.

        Raises:
            ValueError: it has none of them, or they are not lists of numbers, one as long as the
                others.
        """
        noted = record.get("depth", record)
        if not isinstance(noted, Mapping):
            raise ValueError("no quantity")
        lists = {name: noted[name] for name in QUANTITIES if noted.get(name) is not None}
        if not lists:
            raise ValueError("no quantity")
        if any(not isinstance(found, list) for found in lists.values()):
            raise ValueError("a quantity is not a list")
        if len({len(found) for found in lists.values()}) > 1:
            raise ValueError("its quantities are of different lengths")
        nothing = [None] * len(next(iter(lists.values())))
        values = {}
        for name in QUANTITIES:
            found = lists.get(name, nothing)
            mask = [value is None for value in found]
            values[name] = np.ma.array(np.array(found, dtype=np.float32), mask=mask)
        missing = QUANTITIES.keys() - lists.keys()
        return cls(
            record["step"],
            values,
            frozenset(name for name in missing if not QUANTITIES[name].optional),
        )

    def to_json(self) -> dict[str, Any]:
        """A record of metrics.jsonl: one list per quantity, null where it does not apply.

        Numbers have the fewest digits that give the same fp32.
        """
        lists = {
            name: [None if value is None else float(str(np.float32(value))) for value in found]
            for name, found in ((name, array.tolist()) for name, array in self.values.items())
            if name not in self.missing
            and not (QUANTITIES[name].optional and not self.values[name].count())
        }
        return {"step": self.step, "depth": lists}

    @property
    def sub_layers(self) -> int:
        """Number of sub-layers."""
        return len(self.values["gradient_norm"])

    def summary(self) -> dict[str, float]:
        """Minimum, median, maximum and first depth that is not finite, for MLflow.

        Keys are `depth.QUANTITY.min`, `.median`, `.max` (of what is finite) and
        `.first_nonfinite` (a sub-layer's number; only if a value is not finite).
        """
        found: dict[str, float] = {}
        for name, values in self.values.items():
            finite = finite_values(values)
            if finite.size:
                found[f"{DEPTH}{name}.min"] = float(finite.min())
                found[f"{DEPTH}{name}.median"] = float(np.median(finite))
                found[f"{DEPTH}{name}.max"] = float(finite.max())
            first = first_nonfinite(values)
            if first is not None:
                found[f"{DEPTH}{name}.first_nonfinite"] = float(first)
        return found

    def alarm(self) -> str | None:
        """A message with each quantity's first non-finite sub-layer; None if all are finite."""
        first = {name: first_nonfinite(values) for name, values in self.values.items()}
        where = [f"{name} from sub-layer {l}" for name, l in first.items() if l is not None]
        return f"step {self.step}: not finite: {', '.join(where)}" if where else None


def not_recorded(profiles: Sequence[DepthProfile]) -> str | None:
    """A message that lists quantities missing at some steps; None if none is missing."""
    steps = [profile.step for profile in profiles if profile.missing]
    if not steps:
        return None
    names = {name for profile in profiles for name in profile.missing}
    between = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
    return f"not recorded at {between}: {', '.join(name for name in QUANTITIES if name in names)}"


def finite_values(values: Values) -> np.ndarray[Any, Any]:
    """The finite values, without masked ones."""
    present = values.compressed()
    return np.asarray(present[np.isfinite(present)])


def first_nonfinite(values: Values) -> int | None:
    """The first sub-layer whose value is not masked and not finite; None if there is none."""
    bad = np.flatnonzero(~np.isfinite(values.data) & ~np.ma.getmaskarray(values))
    return int(bad[0]) if bad.size else None


def read_profiles(run: Path | str, *, may_lack: bool = False) -> list[DepthProfile]:
    """The profiles of a run, in the order of their steps.

    They are records of metrics.jsonl; those that an earlier version wrote are in depth.jsonl.

    Args:
        run: the run's folder.
        may_lack: return an empty list for a run without profiles instead of raising.

    Raises:
        UserError: the run has none, or a line of its files is not a valid record.
    """
    run_folder = Path(run)
    if not run_folder.is_dir():
        raise UserError(f"{run_folder} is not a run's folder{nearby(run_folder)}")
    path, earlier = run_folder / METRICS_FILE, run_folder / EARLIER_DEPTH_FILE
    profiles: list[DepthProfile] = []
    for source in (earlier, path):
        for record in iterate_metrics(source):
            if source == earlier or "depth" in record:
                profiles.append(_profile(record, source, profiles))
    if not profiles and not may_lack:
        raise UserError(
            f"{path} has no depth profiles; tracking.depth_every sets the steps between them"
        )
    return profiles


def _profile(record: dict[str, Any], path: Path, before: Sequence[DepthProfile]) -> DepthProfile:
    """The profile in a record; it must have as many sub-layers as the earlier ones."""
    try:
        profile = DepthProfile.from_json(record)
        if before and profile.sub_layers != before[0].sub_layers:
            raise ValueError("it has another number of sub-layers")
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path}: the line of step {record['step']} is not a depth profile ({error}); remove "
            "the line, or move the file away"
        ) from error
    return profile
