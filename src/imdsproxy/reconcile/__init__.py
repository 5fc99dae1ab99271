"""Tools of every loop: the reconciler, progress, backoff and tickets of pending changes."""
