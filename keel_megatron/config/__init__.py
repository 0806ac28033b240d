"""What a run is: one frozen pydantic model a section, loaded from YAML and dotted overrides."""

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
