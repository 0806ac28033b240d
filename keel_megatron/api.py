"""The Python interface: what `import keel_megatron as keel` offers beside plain functions.

Everything that needs torch is imported when it is called, so that a script that only plans or reads
starts fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from keel_megatron import compat
from keel_megatron.config.load import require_valid
from keel_megatron.config.run import RunConfig
from keel_megatron.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from keel_megatron.data.huggingface import HuggingFaceTokenizer
    from keel_megatron.data.tokenizer import Tokenizer
    from keel_megatron.evaluation.benchmarks import Evaluation
    from keel_megatron.evaluation.perplexity import Total
    from keel_megatron.inference.generate import Completion
    from keel_megatron.inference.source import Source
    from keel_megatron.planner.plan import Plan
    from keel_megatron.runtime.distributed import Runtime
    from keel_megatron.training.run import Outcome


def plan(config: RunConfig, gpus: int | None = None, gpu: str = "h200") -> Plan:
    """Predict stages, memory, speed and duration of a run, as `keel plan` does; needs no GPU.

    Args:
        config: the run.
        gpus: number of devices; None: one replica of the layout.
        gpu: the device type: h200, h100, a100, b200 or cpu.

    Raises:
        ConfigError: the configuration does not fit that number of devices.
        UserError: there is no such device type, or the number of devices is below 1.
    """
    if gpus is not None and gpus < 1:
        raise UserError(f"gpus: {gpus} must be at least 1")
    from keel_megatron.layout.devices import device_named
    from keel_megatron.planner.plan import make_plan

    count = config.parallel.model_parallel_size if gpus is None else gpus
    require_valid(config, f"run {config.training.name}", count)
    return make_plan(config, count, device_named(gpu))


def train(config: RunConfig) -> Outcome:
    """Train a run in this process, or resume it from its newest checkpoint, as `keel train` does.

    In a process that torchrun has started, this process is one of the run's ranks, and every rank
    calls the function; otherwise it is the only one. Ctrl-C ends the run after its current step,
    with a checkpoint.

    Args:
        config: the run.

    Returns:
        The run's folder and how it ended: `exit_code` is 0 for a complete run.

    Raises:
        ConfigError: the configuration does not fit the number of processes.
        UserError: the run's data or folder does not match the configuration, or another process
            trains the run, or this process holds a model.
        DivergedError: training has diverged.
        SystemExit: Ctrl-C before the first step.
    """
    compat.install()
    from keel_megatron.training import run, startup

    startup.check(config)
    return run.train(config)


def load_model(path: Path | str, step: int | None = None) -> Model:
    """Load a model with its tokenizer into this process.

    On the GPU if there is one and the run did not set `training.device: cpu`. A process holds one
    model at a time: `close` it before the next one is loaded, or use it in a `with` statement.

    Args:
        path: folder of a run, runs/NAME, or of a checkpoint; or a Hugging Face folder.
        step: of a run's checkpoint; None: the newest valid one.

    Raises:
        UserError: there is no such checkpoint, or this process holds a model.
    """
    compat.install()
    from keel_megatron.inference.source import opened

    with ExitStack() as stack:
        source, runtime = stack.enter_context(opened(Path(path), step=step))
        return Model(Path(path), source, runtime, stack.pop_all())


class Model:
    """A trained model in this process, from `load_model`; a context manager that closes it.

    Attributes:
        path: the folder that it is from.
        config: the run's configuration, for one process.
    """

    def __init__(self, path: Path, source: Source, runtime: Runtime, opened: ExitStack) -> None:
        self.path, self.config = path, source.config
        self._loaded: tuple[Source, Runtime] | None = (source, runtime)
        self._opened = opened

    @property
    def step(self) -> int | None:
        """Step of the checkpoint; None: a Hugging Face folder."""
        return self._source.step

    @property
    def module(self) -> nn.Module:
        """The model, in evaluation mode: Megatron-core's GPTModel, with Keel layers."""
        return self._source.model

    @property
    def tokenizer(self) -> Tokenizer | HuggingFaceTokenizer:
        """The model's tokenizer: `encode` text to tokens, `decode` tokens to text."""
        return self._source.tokenizer

    def generate(
        self,
        *prompts: str,
        max_new_tokens: int = 64,
        temperature: float = 0.8,
        top_p: float = 0.95,
        seed: int = 0,
        stop: Sequence[str] = (),
        slide: bool = False,
        chat: bool = False,
        batch_size: int = 8,
    ) -> list[Completion]:
        """Continue prompts, as `keel generate`.

        Args:
            prompts: the texts to continue.
            max_new_tokens: maximum number of tokens to generate.
            temperature: sampling temperature; 0: greedy decoding.
            top_p: nucleus sampling: probability mass to sample from.
            seed: of the sampling.
            stop: texts before which a continuation ends.
            slide: at the end of the context continue with its newest half.
            chat: each prompt is a user's message, which the model answers.
            batch_size: prompts that are continued at a time.

        Returns:
            A completion a prompt: the `text` that follows, its new `tokens`, and why it `ended`.

        Raises:
            UserError: a setting is invalid (named as the option of `keel generate`), a prompt does
                not fit the context, or the model has no chat template.
        """
        from keel_megatron.inference.generate import continue_prompts
        from keel_megatron.inference.sampling import Sampling

        if batch_size < 1:
            raise UserError(f"--batch-size: {batch_size} must be at least 1")
        texts = (stop,) if isinstance(stop, str) else tuple(stop)
        sampling = Sampling(max_new_tokens, temperature, top_p, seed, texts, slide)
        completions, _speed = continue_prompts(
            *self._now(), list(prompts), sampling, batch_size=batch_size, chat=chat
        )
        return completions

    def logits(self, text: str | Sequence[int]) -> Tensor:
        """Logits [s, vocab_size] after each token of a text, fp32, on the model's device.

        Args:
            text: a text, or tokens; 1 to data.seq_length of them. Training put the tokenizer's
                end-of-document token `eod` before each document.

        Raises:
            UserError: the number of tokens is not from 1 to the context, or one of them is not in
                the vocabulary.
        """
        import torch

        source, runtime = self._now()
        tokens = source.tokenizer.encode(text) if isinstance(text, str) else list(text)
        context = source.config.data.seq_length
        if not 1 <= len(tokens) <= context:
            raise UserError(
                f"logits: {len(tokens)} tokens must be from 1 to the context, {context} "
                "(data.seq_length)"
            )
        size = source.config.data.vocab_size
        for token in tokens:
            if not 0 <= token < size:
                raise UserError(
                    f"logits: token {token} must be from 0 to {size - 1} (data.vocab_size)"
                )
        rows = torch.tensor([tokens], device=runtime.device)
        positions = torch.arange(len(tokens), device=runtime.device)[None]
        with torch.inference_mode():
            logits: Tensor = source.model(rows, positions, None)[0].float()
        return logits

    def perplexity(
        self, *paths: Path | str, text_key: str = "text", stride: int | None = None
    ) -> Total:
        """Perplexity and bits per byte of texts, as `keel evaluate --text`.

        Args:
            paths: files, folders or globs, of the formats that `keel data build` reads.
            text_key: key or column of the text in a record.
            stride: tokens by which the window over a long document moves; None: half of the
                context.

        Returns:
            Of all documents together: `perplexity`, `bits_per_byte` and their standard errors,
            numbers of `documents`, `bytes` and `tokens`.

        Raises:
            UserError: a text cannot be read, or there is none.
        """
        from keel_megatron.evaluation.perplexity import DocumentScore, total
        from keel_megatron.evaluation.scoring import BATCH_TOKENS
        from keel_megatron.evaluation.text import Texts, evaluate_texts

        texts = Texts(tuple(map(Path, paths)), text_key, stride, BATCH_TOKENS)
        documents: list[DocumentScore] = []
        evaluate_texts(*self._now(), texts, _ignore, lambda _path, one: documents.append(one))
        return total(documents)

    def evaluate(
        self,
        *tasks: str,
        limit: float | None = None,
        num_fewshot: int | None = None,
        seed: int | None = None,
        include_path: Path | str | None = None,
    ) -> Evaluation:
        """Evaluate on tasks of lm-eval, as `keel evaluate --tasks`; needs the extra `evaluate`.

        Args:
            tasks: names of tasks, groups or tags; patterns too.
            limit: documents of each task; below 1, a share of them.
            num_fewshot: examples before each question; None: the task's own number.
            seed: of examples and sampling; None: lm-eval's.
            include_path: folder of further task files.

        Returns:
            `figures`: a value and standard error for each metric of each task; `details`: lm-eval's
            own results.

        Raises:
            UserError: lm-eval is not installed, or a task cannot be loaded.
        """
        from keel_megatron.evaluation.benchmarks import evaluate_benchmarks
        from keel_megatron.evaluation.tasks import Choice

        include = None if include_path is None else Path(include_path)
        choice = Choice(tasks, include, limit, num_fewshot, seed)
        loaded = self._now()
        found = evaluate_benchmarks(lambda **_options: nullcontext(loaded), choice)
        assert found is not None
        return found

    def close(self) -> None:
        """Free the model and its process groups; a closed model cannot be used."""
        self._loaded = None
        self._opened.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def _source(self) -> Source:
        return self._now()[0]

    def _now(self) -> tuple[Source, Runtime]:
        if self._loaded is None:
            raise UserError(f"the model of {self.path} is closed; load it again")
        return self._loaded


def _ignore(_text: str) -> None:
    """Take a message that is not shown."""
