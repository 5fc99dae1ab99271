"""Memory that the allocator keeps for a process that needs it no more."""

from __future__ import annotations

import ctypes


def release_memory() -> None:
    """Give the kernel back what is free, as far as the C library can (`malloc_trim(3)`, of glibc alone)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
