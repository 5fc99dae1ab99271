"""Time, as something that is handed in: the rest of imdsproxy never asks the system itself."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_STEP_S: Final = 60.0
"""A clock that is slower than another one by less is not wrong."""


@dataclass(frozen=True, slots=True)
class Moment:
    """A moment that can be stored: how long ago it was is known after a restart, and after a reboot.

    Attributes:
        at: Unix time.
        boot: The kernel's id of the present boot.
        up_s: Seconds since the boot, whatever is done to the wall clock.
    """

    at: float
    boot: str
    up_s: float

    def before(self, seconds: float) -> Moment:
        """The moment so many seconds before."""
        return replace(self, at=self.at - seconds, up_s=self.up_s - seconds)

    def since(self, then: Moment) -> float | None:
        """Seconds since then; `None` where that is not known: the wall clock was set back before a reboot."""
        if self.boot == then.boot:
            return max(0.0, self.up_s - then.up_s)
        passed = self.at - then.at
        return None if passed < -_STEP_S else max(0.0, passed)


class Clock:
    """The kernel's clocks, passed to everything that needs the time."""

    def monotonic(self) -> float:
        """Seconds since an arbitrary start; never goes back, whatever is done to the wall clock."""
        return time.monotonic()

    def now(self) -> datetime:
        """The wall clock in UTC; may jump either way."""
        return datetime.now(UTC)

    def moment(self) -> Moment:
        """Now, by both."""
        up_s = time.clock_gettime(time.CLOCK_BOOTTIME)
        return Moment(self.now().timestamp(), _BOOT_ID.read_text("ascii").strip(), up_s)
