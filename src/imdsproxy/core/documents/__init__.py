"""What a guest reads: one module per dialect, and the tree that they share."""
