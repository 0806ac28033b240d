"""What `training.initialize_from` names, and whether a run can start from it. No torch here.

A Hugging Face folder is the exception: its weights are opened, which imports torch.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from keel_megatron.architecture.residual import RULES, alpha
from keel_megatron.checkpoint import folder, manifest
from keel_megatron.checkpoint.identity import identity_changes, saved_config
from keel_megatron.config.load import load_config
from keel_megatron.config.reading import LARGE, read_small
from keel_megatron.config.run import RunConfig
from keel_megatron.data.huggingface import FILE as JSON
from keel_megatron.data.tokenizer import open_tokenizer
from keel_megatron.errors import UserError

if TYPE_CHECKING:
    from keel_megatron.data.dataset import Dataset

SETTING, POSITION = "training.initialize_from", "training.keep_position"
_STEP = re.compile(r"(?P<run>.+)@(?P<step>[0-9]+)")
_FREE = ("model.init_std", "model.dropout")
"""Settings of the model that its weights and what they compute do not depend on."""
_HUGGING_FACE = "config.json"


@dataclass(frozen=True)
class Place:
    """Where a run starts from."""

    kind: Literal["run", "checkpoint", "huggingface"]
    """run: its newest good checkpoint."""
    path: Path


@dataclass(frozen=True)
class TokenizerFile:
    """The tokenizer of the text that the origin was trained on."""

    path: Path
    sha256: str


def locate(given: Path) -> Place:
    """The folder that `training.initialize_from` names.

    Raises:
        UserError: there is none, or it is neither a run, a checkpoint nor a Hugging Face folder.
    """
    named = _STEP.fullmatch(str(given))
    if named is not None and not given.exists():
        run, step = Path(named["run"]), int(named["step"])
        path = folder.step_folder(run, step)
        if not path.is_dir():
            there = ", ".join(map(str, folder.steps(run))) or "none"
            raise UserError(f"{SETTING}: there is no {path}; steps of {run}: {there}")
        return Place("checkpoint", path)
    if not given.is_dir():
        raise UserError(f"{SETTING}: {given} does not exist, or is not a folder")
    if (given / manifest.MANIFEST).is_file():
        return Place("checkpoint", given)
    if folder.root(given).is_dir():
        if folder.latest(given) is None:
            raise UserError(f"{SETTING}: {given} has no complete checkpoint")
        return Place("run", given)
    if (given / _HUGGING_FACE).is_file():
        return Place("huggingface", given)
    raise UserError(
        f"{SETTING}: {given} is neither a run with checkpoints, nor a checkpoint, nor a Hugging "
        f"Face folder (it has no checkpoints/, {manifest.MANIFEST} or {_HUGGING_FACE})"
    )


def check_origin(config: RunConfig) -> None:
    """See that a run without a checkpoint can start from its origin, as far as a look shows.

    Raises:
        UserError: it cannot; all differences are named together.
    """
    given = config.training.initialize_from
    if given is None or folder.latest(config.training.folder) is not None:
        return
    place = locate(given)
    if place.kind == "huggingface":
        from keel_megatron.huggingface.importing import open_folder  # imports torch

        refuse(config, place.path, open_folder(place.path).config)
        refuse_no_optimizer(config, place.path, {manifest.WEIGHTS_ONLY: True})
        return
    newest = folder.latest(place.path) if place.kind == "run" else place.path
    assert newest is not None
    if place.kind == "run" and not manifest.is_whole(newest):
        return  # the ranks look for an earlier one
    try:
        state = manifest.read_json(newest / manifest.STATE)
    except manifest.DamagedError as error:
        raise UserError(f"{SETTING}: {newest} is damaged: {error}") from None
    of_origin = config_of(newest)
    refuse(config, newest, of_origin)
    refuse_no_optimizer(config, newest, state)
    refuse_other_optimizer(config, newest, of_origin)
    refuse_position(config, newest, of_origin)
    tokenizer = tokenizer_of(newest, state)
    if tokenizer is not None:
        _refuse_other_data(config, tokenizer, of_origin)


def config_of(checkpoint: Path) -> RunConfig:
    """The configuration of a checkpoint's run.

    Raises:
        UserError: it has none.
    """
    saved = checkpoint / manifest.CONFIG
    return load_config(saved) if saved.is_file() else saved_config(checkpoint.parent.parent)


def refuse(config: RunConfig, origin: Path, of_origin: RunConfig) -> None:
    """Refuse an origin of another architecture.

    Args:
        config: the run.
        origin: a checkpoint or a Hugging Face folder.
        of_origin: its configuration.

    Raises:
        UserError: with every difference.
    """
    differences = list(_differences(of_origin, config))
    if differences:
        lines = "\n".join(
            f"  {path}: {there} there, {here} here" for path, there, here in differences
        )
        raise UserError(
            f"{SETTING}: {origin} has weights of another model:\n{lines}\n"
            "set these to the values there"
        )


def refuse_no_optimizer(config: RunConfig, origin: Path, state: Any) -> None:
    """Refuse `training.keep_optimizer` with an origin that has weights only.

    Raises:
        UserError: it has.
    """
    weights_only = not isinstance(state, dict) or state.get(manifest.WEIGHTS_ONLY)
    if config.training.keep_optimizer and weights_only:
        raise UserError(
            f"training.keep_optimizer: {origin} has weights and no optimizer state; set it to false"
        )


def refuse_other_optimizer(config: RunConfig, origin: Path, of_origin: RunConfig) -> None:
    """Refuse `training.keep_optimizer` with the state of another optimizer.

    Raises:
        UserError: it is another's.
    """
    there, here = of_origin.optimizer.name, config.optimizer.name
    if config.training.keep_optimizer and there != here:
        raise UserError(
            f"training.keep_optimizer: {origin} has the state of optimizer.name: {there}, and this "
            f"run's is {here}; set it to false, or optimizer.name to {there}"
        )


def refuse_position(config: RunConfig, origin: Path, of_origin: RunConfig) -> None:
    """Refuse `training.keep_position` where the run could not resume from the origin.

    Args:
        config: the run.
        origin: a checkpoint.
        of_origin: its configuration.

    Raises:
        UserError: a setting that no resume may change differs, or no step is left.
    """
    if not config.training.keep_position:
        return
    changes = list(identity_changes(of_origin, config))
    if changes:
        lines = "\n".join(f"  {path}: {old} there, {new} here" for path, old, new in changes)
        raise UserError(
            f"{POSITION}: {origin} belongs to a run with other settings than this one:\n{lines}\n"
            "set these to the values there, or training.keep_position to false"
        )
    step, steps = folder.step_of(origin), config.training.steps
    if step >= steps:
        raise UserError(
            f"training.steps: {steps} leaves nothing to train after step {step} of {origin}; with "
            "training.keep_position it counts the steps of the origin too"
        )


def data_of_position(config: RunConfig) -> dict[str, Any] | None:
    """The identity of the data on which a run continues another; None if it does not.

    Raises:
        UserError: the origin is not there, or cannot be read.
    """
    found = (_state_of_position(config) or {}).get("data")
    return found if isinstance(found, dict) else None


def position_of_origin(config: RunConfig) -> tuple[int, int] | None:
    """Steps and samples of the origin that a run counts as its own; None if it counts from 0.

    Raises:
        UserError: the origin is not there, or cannot be read.
    """
    state = _state_of_position(config)
    if state is None:
        return None
    step, consumed = state.get("step"), state.get("consumed_samples")
    if type(step) is not int or type(consumed) is not int:
        raise UserError(f"{SETTING}: {config.training.initialize_from} has no readable checkpoint")
    return step, consumed


def _state_of_position(config: RunConfig) -> dict[str, Any] | None:
    """The state of the checkpoint whose position a run keeps; None if it keeps none.

    Empty if its newest checkpoint is damaged: the ranks look for an earlier one.
    """
    given = config.training.initialize_from
    if given is None or not config.training.keep_position:
        return None
    place = locate(given)
    path = folder.latest(place.path) if place.kind == "run" else place.path
    assert path is not None
    try:
        found = manifest.read_json(path / manifest.STATE)
    except manifest.DamagedError:
        return {}
    return found if isinstance(found, dict) else {}


@contextmanager
def on_data_of_position(*, kept: bool) -> Iterator[None]:
    """Context in which other data is refused: because of `training.keep_position`, if it is kept.

    Raises:
        UserError: what is raised within, with the setting's name.
    """
    try:
        yield
    except UserError as error:
        if not kept:
            raise
        raise UserError(
            f"{POSITION}: true continues on the data of training.initialize_from, and false starts "
            f"on any: {error}",
            reported=error.reported,
        ) from None


def refuse_other_tokenizer(tokenizer: TokenizerFile, dataset: Dataset) -> None:
    """Refuse a dataset whose tokens are not those that the origin's weights know.

    Raises:
        UserError: its tokenizer is another one.
    """
    found = dataset.manifest.tokenizer.sha256
    if found != tokenizer.sha256:
        raise UserError(
            f"{SETTING}: its tokenizer {tokenizer.path} (SHA-256 {tokenizer.sha256[:12]}) is not "
            f"that of the dataset {dataset.folder} (SHA-256 {found[:12]}); build the dataset with "
            f"data.tokenizer={tokenizer.path}"
        )


def _refuse_other_data(
    config: RunConfig, tokenizer: TokenizerFile, of_origin: RunConfig | None
) -> None:
    """Refuse settings whose dataset would be in other tokens, before it is built.

    Without data.tokenizer a tokenizer is trained: that of the origin only on the same text.

    Args:
        config: the run.
        tokenizer: the origin's.
        of_origin: the origin's configuration; None: a Hugging Face folder, which has none.

    Raises:
        UserError: the tokenizer would be another one.
    """
    data = config.data
    if data.dataset is not None:
        return  # it is there, and compared when it is opened
    if data.tokenizer is not None:
        content = open_tokenizer(data.tokenizer).file_content()
        same = hashlib.sha256(content).hexdigest() == tokenizer.sha256
        what = f"data.tokenizer, {data.tokenizer}"
    else:
        same = tokenizer.path.name != JSON
        if of_origin is not None:
            then = of_origin.data
            same &= (then.text, then.sources, then.tokenizer) == (data.text, data.sources, None)
        what = "the one that would be trained on this run's data"
    if not same:
        raise UserError(
            f"{SETTING}: its tokenizer {tokenizer.path} (SHA-256 {tokenizer.sha256[:12]}) is not "
            f"{what}; set data.tokenizer={tokenizer.path}"
        )


def tokenizer_of(checkpoint: Path, state: dict[str, Any]) -> TokenizerFile | None:
    """A checkpoint's tokenizer; None if nothing is known of it.

    Raises:
        UserError: it cannot be read.
    """
    for name in manifest.TOKENIZERS:
        path = checkpoint / name
        if path.is_file():
            try:
                return TokenizerFile(path, hashlib.sha256(read_small(path, LARGE)).hexdigest())
            except OSError as error:
                raise UserError(f"{SETTING}: {path} cannot be read: {error.strerror}") from None
    # Earlier versions kept the tokenizer with their prepared data only.
    record = state.get("data", {}).get("files", {}).get("tokenizer.model", {})
    return TokenizerFile(checkpoint, record["sha256"]) if "sha256" in record else None


def _differences(there: RunConfig, here: RunConfig) -> Iterator[tuple[str, Any, Any]]:
    """Settings of the architecture that differ: (path, the origin's value, the run's)."""
    old, new = _architecture(there), _architecture(here)
    for path in old:
        if old[path] != new[path]:
            yield path, old[path], new[path]


def _architecture(config: RunConfig) -> dict[str, Any]:
    """What weights depend on, with defaults resolved."""
    model = config.model
    found = {f"model.{name}": value for name, value in model.model_dump().items()}
    found["model.num_query_groups"] = model.query_groups
    if "alpha" in RULES[model.residual].settings:
        found["model.alpha"] = alpha(model)
    found["data.vocab_size"] = config.data.vocab_size
    return {path: value for path, value in found.items() if path not in _FREE}
