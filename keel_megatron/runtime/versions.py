"""Versions of the packages on which a run's numbers depend."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib import metadata

from keel_megatron import __version__

_PACKAGES = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "triton",
    "apex",
    "deepspeed",
    "numpy",
    "sentencepiece",
)


def package_versions(packages: Iterable[str] = _PACKAGES) -> dict[str, str]:
    """Versions by distribution name, this package's and Python's first; of what is installed."""
    found = {"keel-megatron": __version__, "python": platform.python_version()}
    installed = {name: version(name) for name in packages}
    return found | {name: text for name, text in installed.items() if text is not None}


def version(name: str) -> str | None:
    """The version of an installed distribution; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
