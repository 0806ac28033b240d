"""What a run is: one frozen pydantic model a section, loaded from YAML and dotted overrides."""
