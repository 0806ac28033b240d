"""The commands that the documents show, and what a test does with each.

A block of commands is fenced, and every line of it is one command. Comments right above it say how
the commands are tested, one comment for each command in order or a single one for all:

    <!-- test: run -->                         as it stands, as without a comment
    <!-- test: slow -->                        the same, but not by the quick tests
    <!-- test: dry-run -->                     a launcher's --dry-run
    <!-- test: skip, needs a cluster -->       not run, with the reason
    <!-- test: output -->                      this block shows what a program prints

Words such as CONFIG=yaml/demo.yaml put a file in the place of a name; any others, such as
training.steps=2, are added to the command.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
ACTIVATE = ". .venv/bin/activate"
"""After it `keel` and `python` are the environment's."""
PROGRAMS = (
    *("keel", "make", "python", "python3", "pip", "torchrun", "mlflow", "launchers/", "sbatch"),
    *(".", ".venv/bin/", "bash", "docker", "kubectl", "git", "cp", "ssh", "scancel"),
)
_NAME = re.compile(r"[A-Z_]+=")
_COMMENT = re.compile(r"<!-- test: (.*?) -->")
_BLOCK = re.compile(
    r"(?P<comments>(?:^<!-- test: [^\n]*-->\n+)*)^```(?P<language>[^\n]*)\n(?P<lines>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")


def _word(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![\w/]){re.escape(name)}(?![\w/])")


@dataclass(frozen=True)
class Command:
    """One command of a page."""

    page: str
    number: int
    """Its line."""
    text: str
    how: str
    """run, slow, dry-run or skip."""
    reason: str
    """Why it is not run."""
    names: tuple[tuple[str, str], ...]
    """What stands for what."""
    more: tuple[str, ...]
    """Words that are added."""
    active: bool
    """Whether the page has made the environment's commands available before."""

    def __str__(self) -> str:
        return f"{self.page}:{self.number} {self.text}"

    @property
    def line(self) -> str:
        """The command as a test runs it."""
        text = self.text
        for name, value in self.names:
            text = _word(name).sub(value, text)
        if self.how == "dry-run":  # sbatch and its options are not here
            before, launcher, after = re.split(r"(launchers/\S+)", text, maxsplit=1)
            variables = " ".join(word for word in before.split() if _NAME.match(word))
            text = f"{variables} bash {launcher} --dry-run{after}"
        return " ".join([text, *self.more])


def is_command(text: str) -> bool:
    """Whether a line or inline code is a command."""
    words = text.split()
    while words and _NAME.match(words[0]):
        words.pop(0)
    return bool(words) and any(
        words[0] == name or (name.endswith("/") and words[0].startswith(name)) for name in PROGRAMS
    )


def commands(page: Path) -> Iterator[Command]:
    """The commands of a page's blocks, in order.

    Raises:
        ValueError: a block that is neither commands nor said to be output, or whose comments are
            not one for each command.
    """
    text = page.read_text(encoding="utf-8")
    name, active = str(page.relative_to(ROOT)), False
    for block in _BLOCK.finditer(text):
        comments = _COMMENT.findall(block["comments"])
        if comments == ["output"] or block["language"] == "python":  # tests/docs/test_api_page.py
            continue
        first = text.count("\n", 0, block.start("lines")) + 1
        lines = [
            (first + number, re.sub(r"\s+#\s.*", "", line).strip())
            for number, line in enumerate(block["lines"].splitlines())
            if line.strip()
        ]
        if len(comments) not in (0, 1, len(lines)):
            raise ValueError(f"{name}:{first}: {len(lines)} commands, {len(comments)} comments")
        comments = comments * len(lines) if len(comments) == 1 else comments or [""] * len(lines)
        for (number, line), comment in zip(lines, comments, strict=True):
            if not is_command(line):
                raise ValueError(f"{name}:{number}: no command, and no comment says output: {line}")
            yield _command(name, number, line, comment, active)
            active |= line == ACTIVATE


def _command(page: str, number: int, text: str, comment: str, active: bool) -> Command:
    how, names, more = "run", [], []
    reason = comment.removeprefix("skip, ") if comment.startswith("skip, ") else ""
    if reason:
        how, comment = "skip", ""
    for word in comment.split():
        name, sign, value = word.partition("=")
        if word in ("run", "slow", "dry-run"):
            how = word
        elif sign and "." not in name and _word(name).search(text):
            names.append((name, value))
        else:
            more.append(word)
    return Command(page, number, text, how, reason, tuple(names), tuple(more), active)


def inline(page: Path) -> Iterator[str]:
    """The commands between backticks in a page's text."""
    prose = _BLOCK.sub("", page.read_text(encoding="utf-8"))
    for found in _INLINE.finditer(prose):
        text = " ".join(found[1].split()).replace("\\|", "|")
        if is_command(text):
            yield text
