"""Configuration of a run: one frozen pydantic model per section, from YAML and overrides."""

from keel_megatron.config.errors import ConfigError, Problem, UserError
from keel_megatron.config.load import dump_config, load_config, parse_config
from keel_megatron.config.run import RunConfig

__all__ = [
    "ConfigError",
    "Problem",
    "RunConfig",
    "UserError",
    "dump_config",
    "load_config",
    "parse_config",
]
