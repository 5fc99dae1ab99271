"""Time, as something that is handed in: the rest of imdsproxy never asks the system itself."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """Passed to everything that needs the time."""

    def monotonic(self) -> float:
        """Seconds since an arbitrary start; never goes back, whatever is done to the wall clock."""
        ...

    def now(self) -> datetime:
        """The wall clock in UTC; may jump either way."""
        ...


class SystemClock:
    """The kernel's clocks: CLOCK_MONOTONIC and CLOCK_REALTIME."""

    def monotonic(self) -> float:
        """Seconds of CLOCK_MONOTONIC."""
        return time.monotonic()

    def now(self) -> datetime:
        """CLOCK_REALTIME as an aware datetime in UTC."""
        return datetime.now(UTC)
