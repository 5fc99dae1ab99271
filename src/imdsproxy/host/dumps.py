"""What a process leaves behind when it crashes."""

from __future__ import annotations

import resource


def leave_no_dumps() -> None:
    """Have no memory of this process, nor of those that it starts, written down when one crashes.

    It holds keys and documents. Our units say the same; without them a shell's limit would count.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
