"""JSON schema with which editors complete and check YAML."""

from __future__ import annotations

from typing import Any

from keel_megatron.config.run import RunConfig


def json_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a run's configuration file."""
    schema = RunConfig.model_json_schema()
    text = schema["$defs"]["DataConfig"]["properties"]["text"]
    text["anyOf"].insert(0, {"type": "string", "format": "path"})
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "Keel-Megatron run",
    }
