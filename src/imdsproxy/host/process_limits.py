"""Limits on open files and core dumps, and freeing of memory."""

from __future__ import annotations

import ctypes
import resource
from typing import Final

_WANTED: Final = 65536
"""As our units have it; without them a shell's soft limit is 1024, which a few hostile networks could use up."""


def raise_descriptor_limit() -> None:
    """Raise the limit of open files of this process and its children to that of our units, as the hard limit allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED if hard == resource.RLIM_INFINITY else min(hard, _WANTED)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def descriptor_limit() -> int:
    """How many files this process and those that it starts can have open at most; -1 for no limit."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return -1 if hard == resource.RLIM_INFINITY else hard


def leave_no_dumps() -> None:
    """Write no memory of this process, nor of those that it starts, to disk when one crashes.

    It holds keys and documents. Our units say the same; without them a shell's limit would count.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def release_memory() -> None:
    """Give free memory back to the kernel, as far as the C library can (`malloc_trim(3)`, of glibc alone)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
