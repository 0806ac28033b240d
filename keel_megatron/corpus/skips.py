"""What a source does not take, counted by suffix and reason."""

from __future__ import annotations

from collections.abc import Callable

from keel_megatron.data.manifest import Skipped

HIDDEN = "hidden"
BROKEN = "broken link"
UNREADABLE = "cannot be read"
SPECIAL = "neither file nor folder"
BLANK = "blank"

_ENTRIES = 20
_LOUD = 0.1
_COMPRESSED = ("gz", "gzip", "zst", "zstd", "bz2", "xz")


class Skips:
    """Counts skipped paths."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], list[int]] = {}
        self._first: dict[tuple[str, str], str] = {}

    def add(self, reason: str, location: str, size: int = 0) -> None:
        """Count a path; `size` in bytes, 0 for folders."""
        key = (suffix_of(location), reason)
        counts = self._found.setdefault(key, [0, 0])
        counts[0] += 1
        counts[1] += size
        self._first.setdefault(key, printable(location))

    def entries(self) -> tuple[Skipped, ...]:
        """Counts by suffix and reason, most bytes first; rare suffixes of a reason together."""
        order = sorted(self._found, key=lambda key: (-self._found[key][1], key))
        merged: dict[tuple[str, str], Skipped] = {}
        for number, (suffix, reason) in enumerate(order):
            count, size = self._found[suffix, reason]
            first = self._first[suffix, reason]
            key = (suffix if number < _ENTRIES else "other suffixes", reason)
            if key in merged:
                old = merged[key]
                count, size, first = count + old.count, size + old.bytes, old.first
            merged[key] = Skipped(
                reason=reason, suffix=key[0], count=count, bytes=size, first=first
            )
        return tuple(merged.values())


def report(
    setting: str, where: str, skipped: tuple[Skipped, ...], taken: int, say: Callable[[str], None]
) -> None:
    """Say what was skipped: in one line, or in a warning of several if it is much.

    Args:
        setting: name of the source's setting.
        where: the source's paths.
        skipped: the counts.
        taken: bytes of the files that are taken.
        say: called with each line.
    """
    if not skipped:
        return
    size = sum(entry.bytes for entry in skipped)
    if size <= _LOUD * (size + taken):
        parts = [f"{_count(entry)} (such as {entry.first})" for entry in skipped]
        say(f"{setting}: skipped in {where}: {', '.join(parts)}")
        return
    rule = "!" * 78
    say(rule)
    say(
        f"warning: {setting}: {size / (size + taken):.1%} of the bytes in {where} are left out "
        f"({megabytes(size)} of {megabytes(size + taken)}):"
    )
    for entry in skipped:
        say(f"  {_count(entry)}, {megabytes(entry.bytes)}, such as {entry.first}")
    say(rule)


def _count(entry: Skipped) -> str:
    return " ".join(filter(None, (f"{entry.count:,}", entry.suffix, f"{entry.reason}")))


def megabytes(size: int) -> str:
    """A size for messages."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} bytes"


def suffix_of(location: str) -> str:
    """The suffix of a file's name, such as `.csv` or `.csv.gz`; empty if it has none."""
    name = location.rpartition("/")[2].lstrip(".").lower()
    stem, dot, last = name.rpartition(".")
    if not dot or not last.isalnum() or len(last) > 10:
        return ""
    inner = suffix_of(stem) if last in _COMPRESSED else ""
    return f"{inner}.{last}"


def printable(location: str) -> str:
    """A path as UTF-8 text; bytes of its name that are not are escaped."""
    if location.isascii():
        return location
    return location.encode("utf-8", "backslashreplace").decode()
