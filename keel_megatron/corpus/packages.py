"""Optional packages, imported when a file or an executor needs them."""

from __future__ import annotations

import importlib
from typing import Any

from keel_megatron.errors import UserError


def optional(module: str, needed_for: str) -> Any:
    """Import a module of an optional package.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UserError(
            f"{needed_for} needs the package {package}, which cannot be imported ({error}): "
            "pip install 'keel-megatron[data]'"
        ) from error
