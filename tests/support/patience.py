"""How much longer things may take on a machine that is busy."""

import os
from pathlib import Path


def patience() -> float:
    """By how much longer things may take because this machine has more to do than it has processors."""
    words = Path("/proc/loadavg").read_text().split()
    busy = max(float(words[0]), float(words[3].partition("/")[0]))
    return max(1.0, busy / (os.cpu_count() or 1))
