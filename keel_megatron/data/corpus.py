"""The text of a run: the user's files, or the sources of Python's standard library."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from keel_megatron.config.errors import UserError

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


@dataclass(frozen=True)
class TextFile:
    """One file of a corpus: a document."""

    name: str
    """Stable name: relative to the folder that was given, or the file's own."""
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

    def fingerprint(self) -> str:
        """SHA-256 over the names and contents of all files."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.name}\0{file.size}\0".encode())
            with _opened(file.path) as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()

    def documents(self) -> Iterator[Document]:
        """The texts, one file at a time.

        Raises:
            UserError: a file vanished, changed its size or is not UTF-8.
        """
        for file in self.files:
            text = _decoded(file.path)
            if text.strip():
                yield Document(file.name, text)


def find_corpus(text: tuple[Path, ...] | None, log: Callable[[str], None]) -> Corpus:
    """The corpus of `data.text`; None is the demo corpus.

    A file that is named must be text; in a folder, what is not UTF-8 text is left out and counted.

    Raises:
        UserError: a path is missing or unreadable, or there is no text in any of them.
    """
    if text is None:
        root = Path(sysconfig.get_path("stdlib"))
        found = [path for path in sorted(root.rglob("*.py")) if _is_demo(path.relative_to(root))]
        files = _text_files(root, found, log)
        description = f"the Python standard library's sources ({root})"
    else:
        files = []
        for path in text:
            files.extend(_user_files(path, log))
        description = ", ".join(str(path) for path in text)
    files = [file for file in files if file.size]
    if not files:
        raise UserError(
            f"data.text: there is no text in {description}; name files or folders with UTF-8 text"
        )
    return Corpus(description, tuple(files))


def _is_demo(relative: Path) -> bool:
    return not _DEMO_WITHOUT.intersection(relative.parts)


def _user_files(path: Path, log: Callable[[str], None]) -> list[TextFile]:
    if path.is_dir():
        found = [
            entry
            for entry in sorted(path.rglob("*"))
            if entry.is_file() and not any(p.startswith(".") for p in entry.relative_to(path).parts)
        ]
        return _text_files(path, found, log)
    if not path.exists():
        raise UserError(f"data.text: {path} does not exist")
    if not path.is_file():
        raise UserError(f"data.text: {path} is neither a file nor a folder")
    _decoded(path)
    return [TextFile(path.name, path, path.stat().st_size)]


def _text_files(root: Path, paths: list[Path], log: Callable[[str], None]) -> list[TextFile]:
    """Those of a folder's files that are text."""
    files = []
    skipped: list[Path] = []
    for path in paths:
        try:
            _decoded(path)
        except UserError:
            skipped.append(path)
            continue
        files.append(TextFile(path.relative_to(root).as_posix(), path, path.stat().st_size))
    if skipped:
        log(
            f"data.text: left out {len(skipped)} files of {root} that are not readable UTF-8 "
            f"text, such as {skipped[0].relative_to(root)}"
        )
    return files


def _opened(path: Path):  # type: ignore[no-untyped-def]
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"data.text: {path} cannot be read: {error.strerror}") from error


def _decoded(path: Path) -> str:
    """The file's text, its line ends untouched."""
    try:
        with _opened(path) as stream:
            content: bytes = stream.read()
        if b"\0" in content:
            raise UserError(f"data.text: {path} is not text: it holds NUL bytes")
        return content.decode("utf-8")
    except OSError as error:
        raise UserError(f"data.text: {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"data.text: {path} is not UTF-8 text (byte {error.start}); convert it to UTF-8"
        ) from error


def split(corpus: Corpus, fraction: float) -> tuple[Callable[[], Iterator[Document]], ...]:
    """The training and the validation side of a corpus, each to be iterated anew at will.

    Documents go to a side by a hash of their names, the nearest to `fraction` of them to
    validation and at least one; the only document of a corpus is cut at a line near its end.
    """
    if len(corpus.files) == 1:
        return tuple(lambda part=part: iter([_cut(corpus, fraction)[part]]) for part in (0, 1))
    ordered = sorted(corpus.files, key=lambda file: hashlib.sha256(file.name.encode()).digest())
    count = min(len(ordered) - 1, max(1, round(fraction * len(ordered))))
    chosen = {file.name for file in ordered[:count]}

    def side(validation: bool) -> Iterator[Document]:
        for document in corpus.documents():
            if (document.name in chosen) == validation:
                yield document

    return (lambda: side(False)), (lambda: side(True))


def _cut(corpus: Corpus, fraction: float) -> tuple[Document, Document]:
    """A single document's beginning and end, cut after a line's end."""
    (document,) = corpus.documents()
    at = int(len(document.text) * (1.0 - fraction))
    at = document.text.rfind("\n", 0, at) + 1 or at
    name, text = document.name, document.text
    return Document(f"{name}[:{at}]", text[:at]), Document(f"{name}[{at}:]", text[at:])
