"""`keel import`: a Hugging Face folder as a run with a checkpoint of step 0."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from keel_megatron.architecture.parameters import parameter_count
from keel_megatron.checkpoint.weights import Weight, write_weights
from keel_megatron.config.load import dump_config, parse_config
from keel_megatron.config.reading import LARGE, read_small
from keel_megatron.config.run import RunConfig
from keel_megatron.data.chat.templates import FILE as TEMPLATE
from keel_megatron.data.chat.templates import template_beside
from keel_megatron.data.huggingface import FILE as JSON
from keel_megatron.data.tokenizer import MODEL, open_tokenizer
from keel_megatron.errors import ConfigError, UserError
from keel_megatron.huggingface.configuration import CONFIG, Found, from_json
from keel_megatron.huggingface.naming import Fused, parameters
from keel_megatron.huggingface.new_folder import new_folder, require_space
from keel_megatron.huggingface.reading import FolderReader, SavedWeights, read_json
from keel_megatron.huggingface.tokenizer import tokenizer_files
from keel_megatron.runtime.files import write_whole

_PLACEHOLDERS: Final = {
    "optimizer.learning_rate": 1e-4,
    "training.steps": 1,
    "training.global_batch_size": 1,
}
"""Settings without a default that a Hugging Face folder has no value for."""
_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Opened:
    """A Hugging Face folder."""

    config: RunConfig
    """As a run; what the folder does not say is a placeholder."""
    rows: list[Fused]
    """The model's parameters."""
    weights: SavedWeights
    tokenizer: tuple[str, bytes]
    """Name and content of its file."""
    template: str | None
    """Its chat template, if it has one."""

    @property
    def copied(self) -> dict[str, bytes]:
        """The tokenizer's file and the chat template's, by name."""
        name, content = self.tokenizer
        template = {} if self.template is None else {TEMPLATE: self.template.encode()}
        return {name: content, **template}

    def reader(self) -> FolderReader:
        """Reads the weights in place of a checkpoint's."""
        return FolderReader(self.weights, self.rows)


def import_folder(folder: Path, run: Path, say: Callable[[str], None]) -> None:
    """Write a run's folder with the weights, configuration and tokenizer of a Hugging Face folder.

    Args:
        folder: of an exported Keel model, or of a model of the Llama architecture.
        run: the run's folder; it must not exist, or be empty.
        say: called with messages.

    Raises:
        UserError: a file cannot be read or written, or the project does not support the model; all
            such reasons are reported together.
    """
    opened = open_folder(folder, run)
    config, copied = opened.config, opened.copied
    count = parameter_count(config.model, config.data.vocab_size)
    with new_folder(run) as place:
        require_space(place, run, 4 * count)
        say(f"writing {count:,} parameters ({4 * count / 1e9:.3g} GB) to {run}")
        weights = [
            Weight(row.name, row.shape, partial(opened.weights.read, row)) for row in opened.rows
        ]
        origin = {"imported_from": str(folder.resolve())}
        write_weights(place, config, weights, copied, origin)
        write_whole(place / "config.yaml", dump_config(config))
        for name, text in copied.items():
            write_whole(place / name, text)
    say(
        f"imported {folder} as {config.model.residual}, {config.model.sub_layers} sub-layers, to "
        f"{run}"
    )
    values = ", ".join(f"{name}={value:g}" for name, value in _PLACEHOLDERS.items())
    say(f"the folder has no training settings: {values} are placeholders, all others defaults")
    say(
        "it has no optimizer state: train another run from its weights with "
        f"training.initialize_from={run}"
    )


def open_folder(folder: Path, run: Path = Path("unnamed")) -> Opened:
    """Open a Hugging Face folder whose model the project supports.

    Args:
        folder: the folder.
        run: the folder of the run that it is to be, if it is to be one.

    Raises:
        UserError: as in `import_folder`.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    content = read_json(folder, CONFIG)
    found = from_json(content)
    saved = SavedWeights(folder)
    config = _config(folder, run, content, found)
    if config.model.blocks > saved.count:  # not counted up: a stranger's number may be any
        blocks = config.model.blocks
        raise _refused(folder, [f"num_hidden_layers: {blocks} for {saved.count} tensors"])
    rows = list(parameters(config.model, config.data.vocab_size))
    problems = saved.problems(rows, tied=config.model.tie_embeddings)
    if problems:
        raise _refused(folder, problems)
    template = template_beside(folder)
    text = None if template is None else template.text
    return Opened(config, rows, saved, _tokenizer(folder, config), text)


def _config(folder: Path, run: Path, content: dict[str, Any], found: Found) -> RunConfig:
    """The run's configuration.

    Raises:
        UserError: the folder's says what the project does not support, or is not valid.
    """
    mapping: dict[str, dict[str, Any]] = {
        "model": {key: value for key, value in found.model.items() if value is not None},
        "data": {"seq_length": found.seq_length, "vocab_size": found.vocab_size},
        "training": {"name": run.name, "runs_dir": str(run.parent)},
    }
    precision = _PRECISIONS.get(str(content.get("dtype") or content.get("torch_dtype")))
    if precision is not None:
        mapping["training"]["precision"] = precision
    for path, value in _PLACEHOLDERS.items():
        section, key = path.split(".")
        mapping.setdefault(section, {})[key] = value
    try:
        config = parse_config(mapping, str(folder / CONFIG))
    except ConfigError as error:
        if not found.problems:
            raise
        raise _refused(folder, [*found.problems, *map(str, error.problems)]) from None
    if found.problems:
        raise _refused(folder, found.problems)
    return config


def _refused(folder: Path, problems: Any) -> UserError:
    lines = "\n".join(f"  {problem}" for problem in problems)
    return UserError(f"{folder} has a model that is not supported:\n{lines}")


def _tokenizer(folder: Path, config: RunConfig) -> tuple[str, bytes]:
    """Name and content of the tokenizer's file.

    A SentencePiece model is taken if its tokenizer.json, as we would export it, is the folder's:
    then the run's tokenizer is the exported one's to the byte.
    """
    if (folder / MODEL).is_file():
        model = open_tokenizer(folder / MODEL)
        exported = tokenizer_files(model, config.data.seq_length).content.get(JSON)
        if exported is None or not (folder / JSON).is_file():
            return MODEL, model.file_content()
        if exported == read_small(folder / JSON, LARGE):
            return MODEL, model.file_content()
    if not (folder / JSON).is_file():
        raise UserError(f"{folder}: there is no {JSON} or {MODEL}")
    return JSON, open_tokenizer(folder / JSON).file_content()
