"""Configuration of a run: one frozen pydantic model per section, from YAML and overrides."""

from keel_megatron.config.load import dump_config, load_config, parse_config
from keel_megatron.config.run import RunConfig
from keel_megatron.errors import ConfigError, Problem, UserError

__all__ = [
    "ConfigError",
    "Problem",
    "RunConfig",
    "UserError",
    "dump_config",
    "load_config",
    "parse_config",
]
