"""lm-eval's own command line, with our model registered as `keel`.

lm-eval loads no plug-ins, so its own program `lm-eval` does not know the model.
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

from lm_eval._cli import HarnessCLI
from lm_eval.api.registry import model_registry
from lm_eval.utils import setup_logging

from keel_megatron.errors import UserError
from keel_megatron.evaluation.harness import KeelLM
from keel_megatron.evaluation.scoring import BATCH_TOKENS
from keel_megatron.evaluation.serving import Served
from keel_megatron.evaluation.tasks import OFFLINE, is_data_error
from keel_megatron.inference.source import opened

NAME = "keel"
_FOR_EVERY_MODEL = {"batch_size", "max_batch_size", "device"}
"""What lm-eval hands to every model. Here batches are counted in tokens, and the device is the
run's."""


class RegisteredLM(KeelLM):
    """The model of lm-eval's `--model keel --model_args run=RUN,step=N,batch_tokens=N,seed=N`.

    Args:
        run: folder of a run, of a checkpoint, or of a Hugging Face model.
        step: of a run's checkpoint; None: the newest.
        batch_tokens: tokens of a batch.
        seed: random seed of sampled continuations.
        others: what lm-eval hands to every model.

    Raises:
        UserError: an argument is missing or unknown, or there is no such checkpoint.
    """

    models: ClassVar[ExitStack] = ExitStack()
    """The opened models, until the command ends."""

    def __init__(
        self,
        run: str | None = None,
        step: int | None = None,
        batch_tokens: int = BATCH_TOKENS,
        seed: int = 0,
        **others: Any,
    ) -> None:
        unknown = sorted(others.keys() - _FOR_EVERY_MODEL)
        if run is None or unknown:
            problem = f"unknown: {', '.join(unknown)}" if unknown else "run=RUN is missing"
            raise UserError(f"--model_args: {problem}; there are run, step, batch_tokens and seed")
        model, runtime = self.models.enter_context(opened(Path(str(run)), step=step))
        super().__init__(Served(model, runtime, batch_tokens), seed)


def run_command(arguments: list[str]) -> None:
    """Run lm-eval's command line in this process.

    Args:
        arguments: what follows `lm-eval`.

    Raises:
        UserError: the model, a task or its data cannot be loaded.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("keel lm-eval runs in one process; keel evaluate has --processes")
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # this process has threads: no forks
    if arguments == ["--tasks", "list"]:  # its spelling of earlier versions
        arguments = ["ls", "tasks"]
    if NAME not in model_registry:
        model_registry.register(NAME)(RegisteredLM)
    before, sys.argv = sys.argv, ["lm-eval", *arguments]
    try:
        with RegisteredLM.models:
            setup_logging()
            parser = HarnessCLI()
            parser.execute(parser.parse_args())
    except Exception as error:
        if is_data_error(error):
            raise UserError(f"a data set cannot be loaded: {error}. {OFFLINE}") from error
        if isinstance(error, ValueError) and "not found" in str(error):  # a task's name
            raise UserError(f"lm-eval: {error}") from error
        raise
    finally:
        sys.argv = before
