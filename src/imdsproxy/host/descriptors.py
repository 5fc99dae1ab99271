"""How many files and connections a process may have open."""

from __future__ import annotations

import resource
from typing import Final

_WANTED: Final = 65536
"""As our units have it; without them a shell's soft limit is 1024, which a few hostile networks could use up."""


def raise_descriptor_limit() -> None:
    """Have this process, and those that it starts, open as many as our units would let it, if the hard limit does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED if hard == resource.RLIM_INFINITY else min(hard, _WANTED)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
