"""Figures of benchmarks, with their standard errors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from keel_megatron.runtime.tables import table_lines

PREFIX = "lm_eval/"
"""Beginning of the metrics' names in MLflow."""
_NO_FILTER = "none"
_UNNAMEABLE = re.compile(r"[^\w\-. :/]", re.ASCII)
"""What MLflow allows in no name."""


@dataclass(frozen=True)
class Figure:
    """One metric of a task or a group.

    Args:
        task: its name.
        version: of the task, as lm-eval counts them; None: unknown.
        shots: examples before each question; None: the group's tasks differ.
        documents: scored.
        metric: its name.
        filter: how answers were extracted before; None: as they are.
        value: the metric.
        error: its standard error; None: lm-eval has none.
        higher_is_better: None: unknown.
        is_group: whether it is a mean over a group's tasks.
    """

    task: str
    version: str | None
    shots: int | None
    documents: int | None
    metric: str
    filter: str | None
    value: float
    error: float | None
    higher_is_better: bool | None
    is_group: bool

    def name(self, mark: str = "") -> str:
        """The metric's name in MLflow.

        Args:
            mark: `Choice.mark`, which follows the task's name.
        """
        metric = self.metric if self.filter is None else f"{self.metric}.{self.filter}"
        return PREFIX + _UNNAMEABLE.sub("_", f"{self.task}{mark}/{metric}")


def figures(results: Mapping[str, Any]) -> list[Figure]:
    """The figures of lm-eval's results, tasks in its order."""
    found = []
    groups = results.get("groups", {})
    for task, values in results["results"].items():
        samples = results.get("n-samples", {}).get(task, {}).get("effective")
        better = results.get("higher_is_better", {}).get(task, {})
        version = results.get("versions", {}).get(task)
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not _is_number(value):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            found.append(
                Figure(
                    task=task,
                    version=None if version is None else str(version),
                    shots=_whole(results.get("n-shot", {}).get(task)),
                    documents=_whole(samples if samples is not None else values.get("sample_len")),
                    metric=metric,
                    filter=None if kind == _NO_FILTER else kind,
                    value=float(value),
                    error=float(error) if _is_number(error) else None,
                    higher_is_better=better.get(metric),
                    is_group=task in groups,
                )
            )
    return found


def figures_table(found: list[Figure]) -> list[str]:
    """Lines of a table."""
    arrows = {True: "higher", False: "lower", None: ""}
    rows = [
        (
            one.task,
            one.version or "",
            "" if one.shots is None else str(one.shots),
            "" if one.documents is None else f"{one.documents:,}",
            one.metric if one.filter is None else f"{one.metric} ({one.filter})",
            _shown(one.value),
            "" if one.error is None else _shown(one.error),
            arrows[one.higher_is_better],
        )
        for one in found
    ]
    headings = ("task", "version", "shots", "documents", "metric", "value", "±", "better")
    return table_lines(headings, rows, left=(0, 4, 7))


def _shown(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e4 else f"{value:.4g}"


def _is_number(value: Any) -> bool:
    """Whether a value is a number; lm-eval writes N/A for a standard error that there is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(value: Any) -> int | None:
    return value if type(value) is int else None
