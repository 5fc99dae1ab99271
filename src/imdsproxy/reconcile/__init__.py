"""Tools of every loop: progress, backoff and tickets of pending changes; no loop itself."""
