"""Settings: one YAML file and the environment, one strict schema for all rooms; no use of the settings."""
