"""Time, as something that is handed in: the rest of imdsproxy never asks the system itself."""

import time
from datetime import UTC, datetime


class Clock:
    """The kernel's clocks, passed to everything that needs the time."""

    def monotonic(self) -> float:
        """Seconds since an arbitrary start; never goes back, whatever is done to the wall clock."""
        return time.monotonic()

    def now(self) -> datetime:
        """The wall clock in UTC; may jump either way."""
        return datetime.now(UTC)
