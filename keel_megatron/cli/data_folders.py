"""`keel data show`, `keel data verify` and `keel data sample`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from keel_megatron.cli.arguments import ConfigPath, Json, Overrides, print_json
from keel_megatron.cli.console import print_report
from keel_megatron.errors import UserError

if TYPE_CHECKING:
    from keel_megatron.config.run import RunConfig

DAMAGED = 1

Place = Annotated[
    Path,
    typer.Argument(
        metavar="DATASET", help="Dataset folder, or YAML file of a run's configuration."
    ),
]


def show(
    place: Place,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Show a dataset's sources, counts, shares and tokenizer, and what was skipped.

    --json prints the content of data.json.
    """
    from keel_megatron.data.dataset import read_manifest, weights_of
    from keel_megatron.data.report import describe

    folder, config = _find(place, overrides)
    manifest, _earlier = read_manifest(folder)
    if as_json:
        print_json(manifest.model_dump(mode="json"))
    else:
        weights = weights_of(manifest, folder, None if config is None else config.data)
        print_report("\n".join(describe(manifest, folder, weights)))


def verify(place: Place, overrides: Overrides = None) -> None:
    """Read every file of a dataset and compare it with data.json; exit with 1 if one is damaged.

    Checks hashes, indexes, counts, held-out documents, and that all tokens are in the vocabulary.
    Tokens used in place are found by the configuration's data.sources.
    """
    from keel_megatron.data.dataset import open_dataset
    from keel_megatron.data.verify import verify as problems_of

    folder, config = _find(place, overrides)
    dataset = open_dataset(folder, None if config is None else config.data, check=False)
    problems = problems_of(dataset, lambda line: print(line, flush=True))
    for problem in problems:
        print(f"damaged: {problem}")
    if problems:
        raise typer.Exit(DAMAGED)
    print(f"{folder} is as it was built: {dataset.tokens('train'):,} training tokens")


def sample(
    config: ConfigPath,
    overrides: Overrides = None,
    step: Annotated[int, typer.Option(min=1, help="Show samples of this step's batch.")] = 1,
    samples: Annotated[int, typer.Option(min=1, help="Maximum number of samples.")] = 4,
) -> None:
    """Show samples of a run's batches, decoded, with the borders of documents marked.

    The samples of a step that the run has done are those that it recorded.
    """
    from keel_megatron.config.load import load_config
    from keel_megatron.data.dataset import open_dataset
    from keel_megatron.data.index_files import open_sequences
    from keel_megatron.data.report import sample_lines
    from keel_megatron.data.samples import Samples
    from keel_megatron.data.tokenizer import open_tokenizer
    from keel_megatron.training.dataset import ready_dataset
    from keel_megatron.training.step_samples import samples_of_step

    if config.is_dir():
        raise UserError(f"{config} is a folder; the samples are those of a run's configuration")
    settings = load_config(config, tuple(overrides or ()))
    numbers, known = samples_of_step(settings, step)
    _note(f"step {step}: samples {numbers.start:,} to {numbers.stop - 1:,}, {known}")
    folder = ready_dataset(settings, _note, on_one_machine=True)
    dataset = open_dataset(folder, settings.data)
    length, seed = settings.data.seq_length, settings.training.seed
    sources = [
        open_sequences(dataset, source, "train", length, seed, settings.data.cache_dir)
        for source in dataset.sources
    ]
    order = Samples(sources, list(dataset.quotas.values()), seed)
    decode = open_tokenizer(dataset.tokenizer_path).decode
    for line in sample_lines(dataset, order, numbers[:samples], decode):
        print(line)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _find(place: Path, overrides: list[str] | None) -> tuple[Path, RunConfig | None]:
    """The dataset folder of an argument, and its configuration if it is one.

    Raises:
        UserError: the configuration's dataset is not built.
    """
    from keel_megatron.config.load import load_config
    from keel_megatron.training.dataset import find_dataset

    if place.is_dir():
        if overrides:
            raise UserError(f"{overrides[0]}: settings need a configuration, not a dataset folder")
        return place, None
    config = load_config(place, tuple(overrides or ()))
    return find_dataset(config, lambda _text: None, None, may_build=False), config
