"""MAC filters and hop limits: what the kernel does so that guests get their own metadata only."""
