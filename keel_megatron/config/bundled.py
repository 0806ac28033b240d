"""Configurations that the package contains, addressed by name: `keel train demo`.

They are the files of `yaml/`, which is `configs` in an installed package.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = (Path(__file__).parents[1] / "configs").resolve()  # a link to yaml/ in a checkout
_KINDS = ("", "paper", "recipes", "studies")


def bundled_names() -> list[str]:
    """Names of the bundled configurations, such as `demo` and `paper/keel_1024`."""
    found = [path for kind in _KINDS for path in sorted((FOLDER / kind).glob("*.yaml"))]
    return [path.relative_to(FOLDER).with_suffix("").as_posix() for path in found]


def locate(path: Path) -> Path:
    """The file of a configuration that is given by its path or its bundled name.

    A file of that path takes precedence; what is neither is returned unchanged.
    """
    if not path.suffix and path.as_posix() in bundled_names() and not path.is_file():
        return FOLDER / f"{path}.yaml"
    return path
