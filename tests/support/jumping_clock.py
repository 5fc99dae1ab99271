"""imdsproxy's command line with a wall clock that jumps: the file named by `IMDST_CLOCK` says by how much.

Run as a program, with the arguments of `imdsproxy`.
"""

from __future__ import annotations

import os
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from imdsproxy.host import clock

_FILE: Final = Path(os.environ["IMDST_CLOCK"])
_time = time.time


def _offset_s() -> float:
    return float(_FILE.read_text())


class _JumpingClock(clock.Clock):
    def now(self) -> datetime:
        return super().now() + timedelta(seconds=_offset_s())


if __name__ == "__main__":
    clock.Clock = _JumpingClock  # type: ignore[misc] # before anybody imports it
    time.time = lambda: _time() + _offset_s()

    from imdsproxy.cli.main import main

    sys.exit(main())
