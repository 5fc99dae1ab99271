"""Settings: one YAML file, one strict schema; the only package that knows pydantic-settings."""
