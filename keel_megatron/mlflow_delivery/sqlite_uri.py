"""SQLAlchemy's URI of a sqlite file, and back."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote


def sqlite_uri(path: Path) -> str:
    """The URI of a sqlite file, whatever characters its path has.

    SQLAlchemy 2.1 ends the path at `?` and decodes `%XX`, so these two are encoded. The driver is
    then named, because MLflow makes the parent folder of what follows a plain `sqlite:///` without
    decoding it.
    """
    text = str(path)
    quoted = text.replace("%", "%25").replace("?", "%3F")
    return f"{'sqlite' if quoted == text else 'sqlite+pysqlite'}:///{quoted}"


def sqlite_file(uri: str) -> Path | None:
    """The file of a sqlite URI; None for any other."""
    kind, _, rest = uri.partition("://")
    if kind.partition("+")[0] != "sqlite":
        return None
    return Path(unquote(rest.removeprefix("/").partition("?")[0]))
