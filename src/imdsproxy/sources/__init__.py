"""Sources of networks and instances: one module per source, one interface for all."""
