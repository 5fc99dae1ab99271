"""Settings: one YAML file and the environment, one strict schema."""
