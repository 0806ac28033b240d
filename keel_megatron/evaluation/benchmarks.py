"""`keel evaluate --tasks`: lm-eval's tasks on a run's checkpoint."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, redirect_stdout
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from keel_megatron.evaluation.results import Figure, figures, figures_table
from keel_megatron.evaluation.scoring import BATCH_TOKENS
from keel_megatron.evaluation.serving import Served
from keel_megatron.evaluation.tasks import Choice, load_tasks
from keel_megatron.inference.source import Source
from keel_megatron.runtime.distributed import Runtime
from keel_megatron.runtime.json_text import json_text
from keel_megatron.runtime.versions import package_versions

BOOTSTRAP_DRAWS = 1000
_PACKAGES = ("lm-eval", "torch", "megatron-core", "datasets", "numpy", "sentencepiece")
_TIMEOUT_SECONDS = 86400.0
"""For how long ranks wait for the first, which may load data sets from the network meanwhile."""


@dataclass(frozen=True)
class Evaluation:
    """Results of benchmarks on a model.

    Args:
        step: of the checkpoint; None for a Hugging Face folder.
        figures: the results.
        details: lm-eval's own results, with the tasks' configurations.
    """

    step: int | None
    figures: list[Figure]
    details: Mapping[str, Any]

    def table(self) -> list[str]:
        """Lines of a table."""
        return figures_table(self.figures)

    def metrics(self, choice: Choice) -> dict[str, float]:
        """Values and standard errors by their names in MLflow.

        Args:
            choice: the tasks that were asked for.
        """
        found: dict[str, float] = {}
        for one in self.figures:
            name = one.name(choice.mark)
            found[name] = one.value
            if one.error is not None:
                found[f"{name}_stderr"] = one.error
        return found

    def to_json(self, model: Path, choice: Choice, command: list[str]) -> str:
        """Everything that the results depend on, as one JSON object.

        Args:
            model: the folder that was named.
            choice: the tasks that were asked for.
            command: the command line.
        """
        from lm_eval.utils import handle_non_serializable

        content = {
            "model": str(model),
            "step": self.step,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": command,
            "versions": package_versions(_PACKAGES),
            "tasks": list(choice.names),
            "limit": choice.limit,
            "num_fewshot": choice.shots,
            "seed": choice.seed,
            "figures": [asdict(figure) for figure in self.figures],
            "lm_eval": self.details,
        }
        return json_text(content, default=handle_non_serializable)


def evaluate_benchmarks(
    open_model: Callable[..., AbstractContextManager[tuple[Source, Runtime]]],
    choice: Choice,
    tasks: dict[str, Any] | None = None,
    *,
    is_main: bool = True,
    batch_tokens: int = BATCH_TOKENS,
    say: Callable[[str], None] | None = None,
) -> Evaluation | None:
    """Evaluate a model on lm-eval's tasks; collective over all ranks.

    Args:
        open_model: `inference.source.opened`, which needs no more than `timeout_seconds`.
        choice: the tasks.
        tasks: the same, loaded; None: rank 0 loads them, while the others wait.
        is_main: whether this is global rank 0, where lm-eval runs.
        batch_tokens: tokens of a batch.
        say: called on rank 0 with progress.

    Returns:
        The results on global rank 0; None elsewhere.

    Raises:
        UserError: a task or the model cannot be loaded, a request does not fit, or the model's
            logits are not finite.
    """
    with open_model(timeout_seconds=_TIMEOUT_SECONDS) as (source, runtime):
        served = Served(source, runtime, batch_tokens, say)
        if not is_main:
            served.serve()
            return None
        from keel_megatron.evaluation.harness import KeelLM

        with served.leading():
            tasks = tasks or load_tasks(choice)
            details = evaluate_tasks(KeelLM(served, choice.seed or 0), tasks, choice)
    return Evaluation(source.step, figures(details), details)


def evaluate_tasks(model: Any, tasks: dict[str, Any], choice: Choice) -> dict[str, Any]:
    """lm-eval's results of a model on tasks.

    As lm-eval's own command has them, except that standard errors of metrics that are no means are
    bootstrapped with fewer draws, and in this process: it has threads, so it must not be forked.

    Args:
        model: lm-eval's LM.
        tasks: the result of `load_tasks`.
        choice: what they were loaded with.
    """
    import numpy as np
    import torch
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.evaluator import evaluate

    random.seed(DEFAULT_RANDOM_SEED if choice.seed is None else choice.seed)
    other = DEFAULT_OTHER_SEED if choice.seed is None else choice.seed
    np.random.seed(other)
    torch.manual_seed(other)
    os.environ["DISABLE_MULTIPROC"] = "1"
    with redirect_stdout(sys.stderr):  # it prints
        results = evaluate(
            lm=model,
            task_dict=tasks,
            limit=choice.limit,
            bootstrap_iters=BOOTSTRAP_DRAWS,
            log_samples=False,
            confirm_run_unsafe_code=choice.unsafe_code,
        )
    return dict(results)
