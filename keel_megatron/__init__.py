"""Keel-Megatron: train very deep language models of the Keel kind on Megatron-core.

The Python interface, described in docs/api.md:

    import keel_megatron as keel

    config = keel.load_config("yaml/demo.yaml", {"training.steps": 20})
    keel.train(config)

Names are imported when they are first used: the package itself imports nothing.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from keel_megatron.api import Model, load_model, plan, train
    from keel_megatron.config.load import dump_config, load_config
    from keel_megatron.config.run import RunConfig
    from keel_megatron.depth.profile import read_profiles
    from keel_megatron.errors import ConfigError, DivergedError, UserError
    from keel_megatron.tracking.metrics import read_metrics

__version__ = "0.1.0.dev0"

__all__ = [
    "ConfigError",
    "DivergedError",
    "Model",
    "RunConfig",
    "UserError",
    "__version__",
    "dump_config",
    "load_config",
    "load_model",
    "plan",
    "read_metrics",
    "read_profiles",
    "train",
]

_MODULES = {
    "ConfigError": "errors",
    "DivergedError": "errors",
    "Model": "api",
    "RunConfig": "config.run",
    "UserError": "errors",
    "dump_config": "config.load",
    "load_config": "config.load",
    "load_model": "api",
    "plan": "api",
    "read_metrics": "tracking.metrics",
    "read_profiles": "depth.profile",
    "train": "api",
}
"""Each name's module."""


def __getattr__(name: str) -> object:
    """A name of the interface, imported now (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
