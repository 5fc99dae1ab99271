"""Where networks and instances come from: one module per source, one interface for all."""
