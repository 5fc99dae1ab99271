"""Reports of parts, and tools of every loop: the reconciler, progress, backoff and tickets of pending changes."""
