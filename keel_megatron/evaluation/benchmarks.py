"""`keel evaluate --tasks`: lm-eval's tasks on a run's checkpoint."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from keel_megatron.evaluation.results import Figure, figures
from keel_megatron.evaluation.scoring import BATCH_TOKENS
from keel_megatron.evaluation.serving import Served
from keel_megatron.evaluation.tasks import Choice, load_tasks
from keel_megatron.inference.source import opened
from keel_megatron.runtime.versions import package_versions

BOOTSTRAP_DRAWS = 1000
_PACKAGES = ("lm-eval", "torch", "megatron-core", "datasets", "numpy", "sentencepiece")
_TIMEOUT_SECONDS = 86400.0
"""For how long ranks wait for the first, which may load data sets from the network meanwhile."""


@dataclass(frozen=True)
class Evaluation:
    """Results of benchmarks on a checkpoint.

    Args:
        source: the folder that was named.
        checkpoint: the folder that was evaluated.
        step: of the checkpoint; None for a Hugging Face folder.
        figures: the results.
        details: lm-eval's own results: also the tasks' configurations.
    """

    source: Path
    checkpoint: Path
    step: int | None
    figures: list[Figure]
    details: Mapping[str, Any]

    def to_json(self, choice: Choice, command: list[str]) -> str:
        """Everything that the results depend on, as one JSON object.

        Args:
            choice: the tasks that were asked for.
            command: the command line.
        """
        from lm_eval.utils import handle_non_serializable

        content = {
            "source": str(self.source),
            "checkpoint": str(self.checkpoint),
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
        return json.dumps(content, indent=1, default=handle_non_serializable) + "\n"


def evaluate_benchmarks(
    source: Path,
    choice: Choice,
    *,
    step: int | None = None,
    processes: int = 1,
    model_processes: int = 1,
    batch_tokens: int = BATCH_TOKENS,
    option: str = "--processes",
    say: Callable[[str], None] | None = None,
) -> Evaluation | None:
    """Evaluate a model on lm-eval's tasks.

    Args:
        source: folder of a run, of a checkpoint, or of a Hugging Face model.
        choice: the tasks.
        step: of a run's checkpoint; None: the newest.
        processes: of the group that this process is one of.
        model_processes: of them, those that share one model.
        batch_tokens: tokens of a batch.
        option: what sets `model_processes`, for messages.
        say: called on rank 0 with progress.

    Returns:
        The results on global rank 0; None elsewhere.

    Raises:
        UserError: lm-eval, a task or the model cannot be loaded, a request does not fit, or the
            model's logits are not finite.
    """
    is_main = processes == 1 or os.environ.get("RANK") == "0"
    # Before the model: a mistake in a task's name is told at once.
    tasks = load_tasks(choice) if is_main else {}
    with opened(
        source,
        step=step,
        processes=processes,
        model_processes=model_processes,
        option=option,
        timeout_seconds=_TIMEOUT_SECONDS,
    ) as (model, runtime):
        served = Served(model, runtime, batch_tokens, say)
        if not is_main:
            served.serve()
            return None
        from keel_megatron.evaluation.harness import KeelLM

        with served.leading():
            details = evaluate_tasks(KeelLM(served, choice.seed or 0), tasks, choice)
    return Evaluation(source, model.place, model.step, figures(details), details)


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
