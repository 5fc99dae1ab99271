"""Sources of networks and instances: one folder per source, one interface; what the records mean is in model."""
