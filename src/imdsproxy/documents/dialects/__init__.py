"""Documents for guests: one module per dialect, and their common tree."""
