"""The text of a run: the user's files, or the sources of Python's standard library."""

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

from keel_megatron.config.errors import UserError
from keel_megatron.data.folder import NOT_TEXT, LeftOut, files_below

# Tests and vendored packages are left out of the demo corpus: it is the library itself.
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
# Text, but not text to learn: what a model makes of these is their syntax.
_MARKUP = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".html", ".xml")


@dataclass(frozen=True)
class TextFile:
    """One file of a corpus: a document."""

    name: str
    """Stable and unique: relative to the folder that was given, or the file's own."""
    path: Path
    size: int
    """Bytes."""


@dataclass(frozen=True)
class Document:
    """One document's text, under a name that decides its side of the split."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """The files that `data.text` means, in a fixed order."""

    description: str
    files: tuple[TextFile, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def contents(self) -> dict[str, list[Any]]:
        """Of each file its bytes and the SHA-256 of its contents, by name.

        Contents, not times, however large they are: a copy of the text on another machine finds
        the same prepared data, and hashing takes less than a hundredth of encoding's time.
        """
        found: dict[str, list[Any]] = {}
        for file in self.files:
            with _opened(file.path) as stream:
                found[file.name] = [file.size, hashlib.file_digest(stream, "sha256").hexdigest()]
        return found

    def documents(self) -> Iterator[Document]:
        """The texts, one file at a time.

        Raises:
            UserError: a file vanished, changed its size or is not UTF-8.
        """
        for file in self.files:
            yield Document(file.name, _read(file))


def contents_fingerprint(contents: Mapping[str, list[Any]]) -> str:
    """SHA-256 over the names, sizes and contents that `Corpus.contents` returns, in their order."""
    return hashlib.sha256(json.dumps(list(contents.items())).encode()).hexdigest()


def find_corpus(text: tuple[Path, ...] | None, log: Callable[[str], None]) -> Corpus:
    """The corpus of `data.text`; None is the demo corpus.

    A file that is named must be text; of a folder, what is not UTF-8 text, hidden or a broken link
    is left out and counted. Links to folders are followed.

    Raises:
        UserError: a path is missing or unreadable, or all of them hold nothing but white space.
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
    """See in a moment, without reading any text, that `data.text` can be a corpus.

    Raises:
        UserError: a path is missing or unreadable, or there is nothing in any of them.
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
        f"data.text: there is no text in {where}; name files or folders with UTF-8 text"
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
    """The files of a folder that can be entered."""
    try:
        return files_below(path, left_out)
    except OSError as error:
        raise UserError(f"data.text: {path} cannot be read: {error.strerror}") from error


def _user_files(path: Path, log: Callable[[str], None]) -> list[TextFile]:
    if _is_folder(path):
        left_out = LeftOut(path)
        files = _text_files(_below(path, left_out), left_out)
        if left_out.found:
            log(f"data.text: left out of {path}: {left_out.text()}")
        return files
    return [TextFile(path.name, path, path.stat().st_size)] if _has_text(path) else []


def _each_once(files: list[TextFile]) -> list[TextFile]:
    """The files without repetitions, and with numbers after names that several of them have.

    Else one text could be on both sides of the split, or all texts of one name on one side.
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
    """Say of which files the syntax, not the text alone, is learned."""
    found = [file for file in files if file.path.suffix.lower() in _MARKUP]
    if found:
        log(
            f"warning: data.text: {len(found):,} of {len(files):,} files, such as {found[0].path}, "
            f"are {found[0].path.suffix} and are learned as they stand, syntax and all; to learn "
            "the text in them alone, extract it into text files first"
        )


def _text_files(paths: list[Path], left_out: LeftOut) -> list[TextFile]:
    """Those of a folder's files that are text; blank ones hold none."""
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
    """Whether a file holds more than white space and a byte order mark, a block at a time.

    Raises:
        UserError: it cannot be read or is not UTF-8 text.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, found = 0, False
    try:
        with _opened(path) as stream:
            while block := stream.read(1 << 20):
                if b"\0" in block:
                    raise UserError(f"data.text: {path} is not text: it holds NUL bytes")
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
                f"{len(content)}); start again when it is complete"
            )
        return content.decode("utf-8").removeprefix(_BOM)
    except OSError as error:
        raise UserError(f"data.text: {file.path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise _not_utf8(file.path, error.start) from error


def _not_utf8(path: Path, byte: int) -> UserError:
    return UserError(f"data.text: {path} is not UTF-8 text (byte {byte}); convert it to UTF-8")


def split(corpus: Corpus, fraction: float) -> tuple[Callable[[], Iterator[Document]], ...]:
    """The training and the validation side of a corpus, each to be iterated anew at will.

    Documents go to a side by a hash of their names, the nearest to `fraction` of them to
    validation and at least one; the only document of a corpus is cut at a line near its end.
    """
    if len(corpus.files) == 1:
        return tuple(lambda part=part: iter([_cut(corpus, fraction)[part]]) for part in (0, 1))
    chosen = {file.name for file in _held_out(corpus, fraction)}

    def side(validation: bool) -> Iterator[Document]:
        for document in corpus.documents():
            if (document.name in chosen) == validation:
                yield document

    return (lambda: side(False)), (lambda: side(True))


def describe_split(corpus: Corpus, fraction: float) -> str:
    """What is held out for validation, in words: whole documents may be more than was asked for."""
    if len(corpus.files) == 1:
        return f"validation: the last {fraction:.3g} of the only document"
    chosen = _held_out(corpus, fraction)
    share = sum(file.size for file in chosen) / corpus.size
    return (
        f"validation: {len(chosen):,} of {len(corpus.files):,} documents, {share:.1%} of the "
        f"bytes (data.validation_fraction = {fraction:g})"
    )


def _held_out(corpus: Corpus, fraction: float) -> list[TextFile]:
    """The documents that are kept for validation."""
    ordered = sorted(corpus.files, key=lambda file: hashlib.sha256(file.name.encode()).digest())
    return ordered[: min(len(ordered) - 1, max(1, round(fraction * len(ordered))))]


def _cut(corpus: Corpus, fraction: float) -> tuple[Document, Document]:
    """A single document's beginning and end, cut after a line's end where one is near."""
    (document,) = corpus.documents()
    name, text = document.name, document.text
    at = int(len(text) * (1.0 - fraction))
    # A long line is cut within: the end of the one before could be at the text's beginning.
    nearest = max(at - (len(text) - at), 0)
    at = text.rfind("\n", nearest, at) + 1 or at
    return Document(f"{name}[:{at}]", text[:at]), Document(f"{name}[{at}:]", text[at:])
