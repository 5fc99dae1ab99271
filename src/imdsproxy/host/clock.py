"""Clocks and moments, passed as arguments to code that depends on the time."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_STEP_S: Final = 60.0
"""Tolerance between two clocks, in seconds: a clock that is behind by less counts as right."""


@dataclass(frozen=True, slots=True)
class Moment:
    """Moment that can be stored and compared after a restart or a reboot.

    Attributes:
        boot: Kernel's id of the present boot.
        up_s: Seconds since the boot, independent of the wall clock.
    """

    at: float
    boot: str
    up_s: float

    def before(self, seconds: float) -> Moment:
        return replace(self, at=self.at - seconds, up_s=self.up_s - seconds)

    def since(self, then: Moment) -> float | None:
        """Return the seconds since then; `None` if unknown, because the wall clock was set back before a reboot."""
        if self.boot == then.boot:
            return max(0.0, self.up_s - then.up_s)
        passed = self.at - then.at
        return None if passed < -_STEP_S else max(0.0, passed)


class Clock:
    """Kernel's clocks, passed to every part that needs the time."""

    def monotonic(self) -> float:
        """Return seconds since an arbitrary start; they never go back, whatever happens to the wall clock."""
        return time.monotonic()

    def now(self) -> datetime:
        """Return the wall clock's time in UTC; it may jump either way."""
        return datetime.now(UTC)

    def moment(self) -> Moment:
        up_s = time.clock_gettime(time.CLOCK_BOOTTIME)
        return Moment(self.now().timestamp(), _BOOT_ID.read_text("ascii").strip(), up_s)
