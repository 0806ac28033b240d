"""The corpus of a run: the user's files, or the sources of Python's standard library."""

from __future__ import annotations

import codecs
import hashlib
import json
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import Any

from keel_megatron.data.text_files import NOT_TEXT, LeftOut, files_below
from keel_megatron.errors import UserError

# The demo corpus excludes tests and vendored packages.
_DEMO_WITHOUT = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
    "ensurepip",
}


_BOM = "\ufeff"
# Text files in which a model learns mostly the markup syntax.
_MARKUP = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".html", ".xml")


@dataclass(frozen=True)
class TextFile:
    """One file of a corpus: a document."""

    name: str
    """Stable, unique name: relative to the given folder, or the file name."""
    path: Path
    size: int
    """Bytes."""


@dataclass(frozen=True)
class Document:
    """Text of a document, with the name that determines its side of the split."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """The files of `data.text`, in a fixed order."""

    description: str
    files: tuple[TextFile, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def contents(self) -> dict[str, list[Any]]:
        """Size and SHA-256 of each file, by name.

        Contents are hashed, not timestamps: a copy of the corpus on another machine uses the same
        prepared data. Hashing takes less than 1 % of the time of encoding.
        """
        found: dict[str, list[Any]] = {}
        for file in self.files:
            with _opened(file.path) as stream:
                found[file.name] = [file.size, hashlib.file_digest(stream, "sha256").hexdigest()]
        return found

    def documents(self) -> Iterator[Document]:
        """The texts, one file at a time.

        Raises:
            UserError: a file disappeared, changed its size or is not UTF-8.
        """
        for file in self.files:
            yield Document(file.name, _read(file))


def contents_fingerprint(contents: Mapping[str, list[Any]]) -> str:
    """SHA-256 of the result of `Corpus.contents`, in order."""
    return hashlib.sha256(json.dumps(list(contents.items())).encode()).hexdigest()


def find_corpus(text: tuple[Path, ...] | None, log: Callable[[str], None]) -> Corpus:
    """Find the corpus of `data.text`; None: the demo corpus.

    A named file must be text. In a folder, files that are not UTF-8 text, hidden files and broken
    links are skipped and counted. Links to folders are followed.

    Raises:
        UserError: a path is missing or unreadable, or all files are blank.
    """
    if text is None:
        root = Path(sysconfig.get_path("stdlib"))
        found = [path for path in sorted(root.rglob("*.py")) if _is_demo(path.relative_to(root))]
        files = _text_files(found, LeftOut(root))
        description = f"the Python standard library's sources ({root})"
    else:
        files = []
        for path in text:
            files.extend(_user_files(path, log))
        files = _each_once(files)
        _warn_of_markup(files, log)
        description = ", ".join(str(path) for path in text)
    if not files:
        raise _no_text(description)
    return Corpus(description, tuple(files))


def check_paths(text: tuple[Path, ...] | None) -> None:
    """Check quickly, without reading files, that `data.text` can be a corpus.

    Raises:
        UserError: a path is missing or unreadable, or all of them are empty.
    """
    if text is None:
        return
    is_empty = True
    for path in text:
        if _is_folder(path):
            is_empty &= not _below(path, LeftOut(path))
        else:
            with _opened(path):
                is_empty &= path.stat().st_size == 0
    if is_empty:
        raise _no_text(", ".join(map(str, text)))


def _no_text(where: str) -> UserError:
    return UserError(
        f"data.text: there is no text in {where}; give files or folders with UTF-8 text"
    )


def _is_demo(relative: Path) -> bool:
    return not _DEMO_WITHOUT.intersection(relative.parts)


def _is_folder(path: Path) -> bool:
    """Whether a path is a folder; otherwise it is a file."""
    try:
        is_folder, is_file, exists = path.is_dir(), path.is_file(), path.exists()
    except OSError as error:
        raise UserError(f"data.text: {path} cannot be read: {error.strerror}") from error
    if not exists:
        raise UserError(f"data.text: {path} does not exist")
    if not is_folder and not is_file:
        raise UserError(f"data.text: {path} is neither a file nor a folder")
    return is_folder


def _below(path: Path, left_out: LeftOut) -> list[Path]:
    """The files below a readable folder."""
    try:
        return files_below(path, left_out)
    except OSError as error:
        raise UserError(f"data.text: {path} cannot be read: {error.strerror}") from error


def _user_files(path: Path, log: Callable[[str], None]) -> list[TextFile]:
    if _is_folder(path):
        left_out = LeftOut(path)
        files = _text_files(_below(path, left_out), left_out)
        if left_out.found:
            log(f"data.text: skipped in {path}: {left_out.text()}")
        return files
    return [TextFile(path.name, path, path.stat().st_size)] if _has_text(path) else []


def _each_once(files: list[TextFile]) -> list[TextFile]:
    """Remove duplicate files, and number equal names.

    Otherwise a text could be on both sides of the split, or all texts of one name on one side.
    """
    unique = {file.path.resolve(): file for file in reversed(files)}
    taken: set[str] = set()
    named = []
    for file in reversed(unique.values()):
        name, number = file.name, 1
        while name in taken:
            number += 1
            name = f"{file.name}~{number}"
        taken.add(name)
        named.append(replace(file, name=name))
    return named


def _warn_of_markup(files: list[TextFile], log: Callable[[str], None]) -> None:
    """Warn about files in which the model also learns markup syntax."""
    found = [file for file in files if file.path.suffix.lower() in _MARKUP]
    if found:
        log(
            f"warning: data.text: {len(found):,} of {len(files):,} files, such as {found[0].path}, "
            f"are {found[0].path.suffix} files, and the model will learn their syntax too; to "
            "train only on their text, extract it into text files first"
        )


def _text_files(paths: list[Path], left_out: LeftOut) -> list[TextFile]:
    """The text files of a folder, without blank ones."""
    files = []
    for path in paths:
        try:
            if _has_text(path):
                name = path.relative_to(left_out.root).as_posix()
                files.append(TextFile(name, path, path.stat().st_size))
        except UserError:
            left_out.add(NOT_TEXT, path)
    return files


def _opened(path: Path) -> BufferedReader:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"data.text: {path} cannot be read: {error.strerror}") from error


def _has_text(path: Path) -> bool:
    """Whether a file contains more than white space and a byte order mark.

    Raises:
        UserError: the file cannot be read or is not UTF-8 text.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, found = 0, False
    try:
        with _opened(path) as stream:
            while block := stream.read(1 << 20):
                if b"\0" in block:
                    raise UserError(f"data.text: {path} is not text: it contains NUL bytes")
                begun = len(decoder.getstate()[0])  # of a character that the last block began
                text = decoder.decode(block)
                found |= bool((text if offset else text.removeprefix(_BOM)).strip())
                offset += len(block)
            begun = len(decoder.getstate()[0])
            decoder.decode(b"", final=True)
    except OSError as error:
        raise UserError(f"data.text: {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise _not_utf8(path, offset - begun + error.start) from error
    return found


def _read(file: TextFile) -> str:
    """The file's text, its line ends untouched, without a byte order mark."""
    try:
        with _opened(file.path) as stream:
            content = stream.read()
        if len(content) != file.size:
            raise UserError(
                f"data.text: {file.path} changed while it was prepared ({file.size} bytes, then "
                f"{len(content)}); restart when the file is complete"
            )
        return content.decode("utf-8").removeprefix(_BOM)
    except OSError as error:
        raise UserError(f"data.text: {file.path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise _not_utf8(file.path, error.start) from error


def _not_utf8(path: Path, byte: int) -> UserError:
    return UserError(f"data.text: {path} is not UTF-8 text (byte {byte}); convert it to UTF-8")


def split(corpus: Corpus, fraction: float) -> tuple[Callable[[], Iterator[Document]], ...]:
    """Split a corpus into training and validation documents; both can be iterated repeatedly.

    A hash of the name determines a document's side: about `fraction` of them, at least one, go to
    validation. A single document is split at a line near its end.
    """
    if len(corpus.files) == 1:
        return tuple(lambda part=part: iter([_split(corpus, fraction)[part]]) for part in (0, 1))
    chosen = {file.name for file in _held_out(corpus, fraction)}

    def side(validation: bool) -> Iterator[Document]:
        for document in corpus.documents():
            if (document.name in chosen) == validation:
                yield document

    return (lambda: side(False)), (lambda: side(True))


def describe_split(corpus: Corpus, fraction: float) -> str:
    """Describe the validation set; its actual fraction may differ, as documents are not split."""
    if len(corpus.files) == 1:
        return f"validation: the last {fraction:.3g} of the only document"
    chosen = _held_out(corpus, fraction)
    share = sum(file.size for file in chosen) / corpus.size
    return (
        f"validation: {len(chosen):,} of {len(corpus.files):,} documents, {share:.1%} of the "
        f"bytes (data.validation_fraction = {fraction:g})"
    )


def _held_out(corpus: Corpus, fraction: float) -> list[TextFile]:
    """The validation documents."""
    ordered = sorted(corpus.files, key=lambda file: hashlib.sha256(file.name.encode()).digest())
    return ordered[: min(len(ordered) - 1, max(1, round(fraction * len(ordered))))]


def _split(corpus: Corpus, fraction: float) -> tuple[Document, Document]:
    """Split a single document, after a line end if one is near."""
    (document,) = corpus.documents()
    name, text = document.name, document.text
    at = int(len(text) * (1.0 - fraction))
    # A long line is split inside: the previous line end could be at the beginning of the text.
    nearest = max(at - (len(text) - at), 0)
    at = text.rfind("\n", nearest, at) + 1 or at
    return Document(f"{name}[:{at}]", text[:at]), Document(f"{name}[{at}:]", text[at:])
