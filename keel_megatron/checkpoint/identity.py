"""Which run a folder belongs to: what of its configuration may change, and what may not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from keel_megatron.checkpoint.folder import latest, steps
from keel_megatron.checkpoint.manifest import CONFIG as CONFIG_FILE
from keel_megatron.checkpoint.manifest import WEIGHTS_ONLY
from keel_megatron.config.inside import check_links
from keel_megatron.config.load import dump_config, flatten, load_config
from keel_megatron.config.nearby import nearby
from keel_megatron.config.run import RunConfig
from keel_megatron.errors import UserError
from keel_megatron.runtime.files import write_whole

# What a run may change between two starts; everything else is the run's identity.
CHANGEABLE = (
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.virtual_pipeline",
    "parallel.sequence",
    "parallel.overlap_grad_reduce",
    "parallel.overlap_param_gather",
    "parallel.layout",
    "parallel.recompute",
    "parallel.memory_gb",
    "parallel.timeout_seconds",
    "parallel.preflight",
    "kernels.",
    "deepspeed.",
    "training.engine",
    "optimizer.",
    "schedule.",
    "checkpoint.",
    "guard.",
    "evaluation.",
    "tracking.",
    "data.cache_dir",
    "data.dataset",  # its path; its contents are fingerprinted
    "data.sources",  # likewise, and the weights
    "data.text",  # likewise
    "data.build",
    "data.tokenizer",  # likewise
    "data.chat_template",  # likewise
    "data.allow_lossy_tokenizer",
    "training.name",
    "training.runs_dir",
    "training.steps",
    "training.z_loss",
    "training.global_batch_size",
    "training.micro_batch_size",
    "training.device",
    "training.deterministic",
    "training.threads",
    "training.gc_every",
    "training.exit_after",
    "training.hang_timeout",
    "training.initialize_from",  # of a start without a checkpoint
    "training.keep_optimizer",  # likewise
    "training.keep_position",  # likewise
    "training.validate_every",
    "training.validation_sequences",
)
# Of those beginnings, what is the run's identity all the same.
FIXED = ("optimizer.name",)

_ARCHITECTURE = ("model.", "data.vocab_size")
_PLACES = ("data.dataset", "data.sources", "data.text", "data.tokenizer", "data.chat_template")


def claim(config: RunConfig) -> None:
    """Make the run's folder this run's, keeping its resolved configuration there.

    A folder without a single step may be claimed by any run.

    Raises:
        UserError: the folder holds another run, or cannot be written.
    """
    check_folder(config)
    folder = config.training.folder
    saved = folder / CONFIG_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(saved, dump_config(config))
    except OSError as error:
        raise UserError(
            f"training.runs_dir: cannot write the run's folder {folder}: {error.strerror}"
        ) from error


def check_folder(config: RunConfig) -> None:
    """See that the run's folder can be this run's; nothing is written.

    Raises:
        UserError: the folder holds another run, or a link in it leads out of it.
    """
    folder = config.training.folder
    check_links(folder)
    saved = folder / CONFIG_FILE
    if saved.is_file() and _has_steps(folder):
        check_identity(saved, config)


def check_identity(saved: Path, config: RunConfig) -> None:
    """Refuse to resume a run under a configuration that makes it another run.

    Raises:
        UserError: with every difference, and what may differ.
    """
    changes = list(identity_changes(load_config(saved), config))
    if changes:
        lines = "\n".join(f"  {path}: {old} there, {new} now" for path, old, new in changes)
        same_model = not any(path.startswith(_ARCHITECTURE) for path, *_ in changes)
        start = ", and training.initialize_from to start from its weights" if same_model else ""
        raise UserError(
            f"{saved.parent} contains a run of another configuration:\n{lines}\n"
            f"set another training.name{start}, or move that folder away\n"
            f"(settings that may change: {changeable()})"
        )


def refuse_weights_only(checkpoint: Path, state: Any) -> None:
    """Refuse to resume from a checkpoint without optimizer state, which `keel import` writes.

    Args:
        checkpoint: the checkpoint.
        state: content of its state.json.

    Raises:
        UserError: it has none.
    """
    if isinstance(state, dict) and state.get(WEIGHTS_ONLY):
        raise UserError(
            f"{checkpoint} has weights and no optimizer state, so training cannot resume from it; "
            "start another run from its weights: training.initialize_from="
            f"{checkpoint.parent.parent}"
        )


def changeable() -> str:
    """The settings that a run may change between two starts, as text."""
    notes = {path: f"{path} (the place, not the contents)" for path in _PLACES}
    notes["optimizer."] = "optimizer.* (but name)"
    return ", ".join(notes.get(p, f"{p}*" if p.endswith(".") else p) for p in CHANGEABLE)


def may_change(path: str) -> bool:
    """Whether a run may change a setting between two starts."""
    return path.startswith(CHANGEABLE) and path not in FIXED


def _has_steps(folder: Path) -> bool:
    metrics = folder / "metrics.jsonl"
    return bool(steps(folder)) or (metrics.is_file() and metrics.stat().st_size > 0)


def identity_changes(saved: RunConfig, current: RunConfig) -> Iterator[tuple[str, Any, Any]]:
    """Settings that differ and may not: (path, saved value, current value)."""
    old, new = flatten(saved), flatten(current)
    for path in sorted(old.keys() | new.keys()):
        if old.get(path) != new.get(path) and not may_change(path):
            yield path, old.get(path), new.get(path)


def saved_config(folder: Path) -> RunConfig:
    """The configuration of the run in a folder.

    Raises:
        UserError: the folder holds no run.
    """
    saved = folder / CONFIG_FILE
    newest = latest(folder)
    if not saved.is_file() and newest is not None:
        saved = newest / CONFIG_FILE
    if not saved.is_file():
        why = f"there is no {CONFIG_FILE} in it" if folder.is_dir() else "it does not exist"
        raise UserError(
            f"{folder} contains no run: {why}; a run's folder is runs/NAME{nearby(folder)}"
        )
    return load_config(saved)
