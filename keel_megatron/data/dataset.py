"""Opens a dataset folder (data/manifest.py), also one of an earlier version.

Nothing in the folder is trusted: it may come from a stranger. Names stay inside the folder, links
are not followed, and tokens that are used in place are found where the configuration says, never
where the folder says.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from keel_megatron.config.data import DataConfig, SourceConfig
from keel_megatron.config.reading import LARGE, parse_json, read_small
from keel_megatron.data.blend import quotas
from keel_megatron.data.chat.templates import FILE as TEMPLATE
from keel_megatron.data.earlier import earlier_dataset
from keel_megatron.data.in_place import find_prefix
from keel_megatron.data.manifest import (
    FORMAT,
    MANIFEST,
    SHARDS,
    FileRecord,
    Manifest,
    Shard,
    SourceRecord,
)
from keel_megatron.data.shards import with_suffix
from keel_megatron.errors import UserError

Part = Literal["train", "validation"]
REMEDY = "restore it, or remove the dataset's folder and build it again: keel data build CONFIG"


@dataclass(frozen=True)
class PlacedShard:
    """A shard and where it lies."""

    record: Shard
    prefix: Path
    """Path of its tokens, without .bin and .idx."""
    home: Path
    """Folder of the dataset's own shards; it also lists what of an external one is held out."""

    @property
    def files(self) -> dict[Path, FileRecord]:
        """Its files."""
        return {self.path(end): file for end, file in self.record.files.items()}

    def path(self, end: str) -> Path:
        """Its .bin, .idx, .npy or .mask file."""
        return with_suffix(self.home / self.record.name if end == "npy" else self.prefix, end)


@dataclass(frozen=True)
class Source:
    """One source of a dataset."""

    record: SourceRecord
    shards: tuple[PlacedShard, ...]

    @property
    def name(self) -> str:
        """Its name in metrics and reports."""
        return self.record.name

    def of(self, part: Part) -> tuple[PlacedShard, ...]:
        """The shards with documents of a part."""
        return tuple(shard for shard in self.shards if shard.record.part in ("both", part))


@dataclass(frozen=True)
class Dataset:
    """A dataset folder and how a run uses it."""

    folder: Path
    manifest: Manifest
    sources: tuple[Source, ...]
    quotas: dict[str, int]
    """Samples per 1,000 of each source."""
    earlier: dict[str, Any] | None = None
    """Identity of a folder of an earlier version."""

    @property
    def tokenizer_path(self) -> Path:
        """tokenizer.model or tokenizer.json."""
        return self.folder / self.manifest.tokenizer.file

    @property
    def chat_template_path(self) -> Path | None:
        """chat_template.jinja; None: there is no chat source."""
        return None if self.manifest.chat_template is None else self.folder / TEMPLATE

    @property
    def kept_files(self) -> tuple[Path, ...]:
        """What a run keeps of it: the tokenizer and the chat template."""
        template = self.chat_template_path
        return (self.tokenizer_path,) if template is None else (self.tokenizer_path, template)

    @property
    def has_masks(self) -> bool:
        """Whether it says of some tokens that they do not count in the loss."""
        return any(source.record.is_chat for source in self.sources)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that determines the tokens."""
        return self.manifest.fingerprint

    def identity(self) -> dict[str, Any]:
        """What must not change when a run resumes; saved in its checkpoints."""
        if self.earlier is not None:
            return self.earlier
        return {**self.manifest.identity(), "blend": self.quotas}

    def tokens(self, part: Part) -> int:
        """Number of tokens of a part."""
        return sum(source.record.tokens(part) for source in self.sources)

    def documents(self, part: Part) -> int:
        """Number of documents of a part."""
        return sum(source.record.documents(part) for source in self.sources)


def open_dataset(folder: Path, data: DataConfig | None, *, check: bool = True) -> Dataset:
    """Open a dataset folder.

    Reads data.json and looks at the sizes of files, but not at their content.

    Args:
        folder: the dataset folder.
        data: the run's data settings: weights, and paths of tokens used in place; None: those of
            the build.
        check: whether to look at the files.

    Raises:
        UserError: the folder is none, is incomplete or damaged, or does not fit the settings.
    """
    manifest, earlier = read_manifest(folder)
    if data is None:
        size = manifest.tokenizer.vocab_size
        data = DataConfig.model_construct(vocab_size=size, seq_length=1, dataset=folder)
    entries = _entries(manifest, folder, data)
    sources = tuple(_source(folder, record, data, entries, earlier) for record in manifest.sources)
    dataset = Dataset(folder, manifest, sources, quotas(_weights(manifest, entries)), earlier)
    if check:
        _check_files(dataset)
    if manifest.tokenizer.vocab_size != data.vocab_size:
        raise UserError(
            f"data.vocab_size: {data.vocab_size} must be {manifest.tokenizer.vocab_size}, the "
            f"vocabulary of the dataset {folder}"
        )
    return dataset


def read_manifest(folder: Path) -> tuple[Manifest, dict[str, Any] | None]:
    """The manifest of a dataset folder; and its identity, if it is of an earlier version.

    Raises:
        UserError: as in `open_dataset`.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise UserError(f"data.dataset: {folder} does not exist, or is not a folder")
    if not path.exists():
        raise UserError(
            f"data.dataset: {folder} is not a dataset: it has no {MANIFEST}; build one: keel data "
            "build CONFIG"
        )
    try:
        if path.is_symlink():
            raise ValueError("it is a link, which is not followed")
        text = read_small(path, LARGE)
        content = parse_json(text)
        if not isinstance(content, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"data.dataset: {path} cannot be read: {reason}") from error
    if "train_tokens" in content:
        return earlier_dataset(content, folder)
    if content.get("format") != FORMAT:
        raise UserError(
            f"data.dataset: {path} has format {content.get('format')!r}; this version reads "
            f"{FORMAT}"
        )
    return _manifest(text, path), None


def dataset_files(dataset: Dataset) -> dict[Path, FileRecord]:
    """All shard files of a dataset."""
    return {
        path: file
        for source in dataset.sources
        for shard in source.shards
        for path, file in shard.files.items()
    }


def check_lengths(dataset: Dataset, seq_length: int) -> None:
    """Check that every source has seq_length + 1 tokens in each part, enough for one sequence.

    Conversations are not checked: they are padded.

    Raises:
        UserError: one has not.
    """
    needed = seq_length + 1
    for source in dataset.sources:
        if source.record.is_chat:
            continue
        where = f"data.sources: {source.name}" if len(dataset.sources) > 1 else "data.text"
        # With two documents, one is held out for any fraction.
        two = source.record.documents("train") + source.record.documents("validation") == 2
        fraction = "" if two else " or another data.validation_fraction"
        for part, called in (("train", "training"), ("validation", "validation")):
            tokens = source.record.tokens(part)  # type: ignore[arg-type]
            if tokens < needed:
                raise UserError(
                    f"{where}: the {called} set has {tokens} tokens, fewer than the {needed} of "
                    f"one sequence (data.seq_length + 1); use more data, a shorter data.seq_length"
                    f"{fraction}"
                )


def _manifest(text: bytes, path: Path) -> Manifest:
    """The content of data.json, checked."""
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"data.dataset: {path} is damaged ({where}: {first['msg']}); {REMEDY}"
        ) from error
    names = [source.name for source in manifest.sources]
    shards = [
        shard.name for source in manifest.sources for shard in source.shards if not shard.external
    ]
    if len(set(names)) < len(names) or len(set(shards)) < len(shards):
        raise UserError(f"data.dataset: {path} is damaged (a name twice); {REMEDY}")
    return manifest


def _entries(manifest: Manifest, folder: Path, data: DataConfig) -> dict[str, SourceConfig]:
    """The entries of data.sources by name of source; those without a name count by position."""
    names = [source.name for source in manifest.sources]
    found = {}
    for number, entry in enumerate(data.sources or ()):
        name = entry.name
        if name is None and len(data.sources or ()) == len(names):
            name = names[number]
        if name not in names:
            raise UserError(
                f"data.sources.{number}: the dataset {folder} has no source "
                f"{name or 'without name'}; name one of {', '.join(names)}"
            )
        found[name] = entry
    missing = [name for name in names if found and name not in found]
    if missing:
        raise UserError(
            f"data.sources: the dataset {folder} also has {', '.join(missing)}; give every source "
            "an entry, or leave out data.sources for the weights with which it was built"
        )
    return found


def _source(
    folder: Path,
    record: SourceRecord,
    data: DataConfig,
    entries: dict[str, SourceConfig],
    earlier: object,
) -> Source:
    """A source, and where its shards lie."""
    home = folder / SHARDS if earlier is None else folder
    entry = entries.get(record.name)
    paths = (*entry.path, *(entry.validation or ())) if entry else data.text or ()
    shards = []
    for shard in record.shards:
        if not {"bin", "idx"} <= shard.files.keys():
            raise UserError(
                f"data.dataset: {folder / MANIFEST} is damaged: {shard.name} has no files"
            )
        if ("mask" in shard.files) != record.is_chat or (record.is_chat and shard.external):
            raise UserError(
                f"data.dataset: {folder / MANIFEST} is damaged: {shard.name} must have a loss mask "
                "if, and only if, it contains conversations"
            )
        prefix = home / shard.name
        if shard.external:
            prefix = find_prefix(paths, record.name, shard, folder)
        shards.append(PlacedShard(shard, prefix, home))
    return Source(record, tuple(shards))


def weights_of(manifest: Manifest, folder: Path, data: DataConfig | None) -> dict[str, float]:
    """The weight of each source: of the run's settings, else of the build, else its tokens.

    Raises:
        UserError: the settings name other sources.
    """
    return _weights(manifest, {} if data is None else _entries(manifest, folder, data))


def _weights(manifest: Manifest, entries: dict[str, SourceConfig]) -> dict[str, float]:
    weights = {
        source.name: entries[source.name].weight if entries else source.weight
        for source in manifest.sources
    }
    if any(weight is None for weight in weights.values()):
        weights = {
            source.name: float(max(1, source.tokens("train"))) for source in manifest.sources
        }
    return {name: float(weight or 0.0) for name, weight in weights.items()}


def _check_files(dataset: Dataset) -> None:
    """Check that all files are there, no links, and as large as they were."""
    folder = dataset.folder
    for place in (folder / SHARDS, *dataset.kept_files):
        if place.is_symlink():
            raise UserError(f"data.dataset: {place} is a link, which is not followed")
    for path in dataset.kept_files:
        if not path.is_file():
            raise UserError(f"data.dataset: {path} is missing; {REMEDY}")
    for source in dataset.sources:
        for shard in source.shards:
            for path, file in shard.files.items():
                own = path.parent == shard.home
                if own and path.is_symlink():
                    raise UserError(f"data.dataset: {path} is a link, which is not followed")
                _check_size(path, file.bytes)


def _check_size(path: Path, size: int) -> None:
    if not path.is_file():
        raise UserError(f"data.dataset: {path} is missing; {REMEDY}")
    found = path.stat().st_size
    if found != size:
        raise UserError(
            f"data.dataset: {path} has {found:,} bytes, and had {size:,} when it was built; "
            f"{REMEDY}"
        )
