"""How long to wait between attempts that fail."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Backoff:
    """Pauses between attempts: each twice as long as the one before, up to the longest.

    Attributes:
        first_s: The pause after the first failure, in seconds.
        longest_s: The longest of them.
    """

    first_s: float
    longest_s: float
    _next_s: float = 0.0

    def fail(self) -> float:
        """An attempt has failed: the pause before the next one."""
        pause = min(self._next_s or self.first_s, self.longest_s)
        self._next_s = pause * 2
        return pause

    def succeed(self) -> None:
        """An attempt has succeeded."""
        self._next_s = 0.0
