"""How often a path is taken from who lives there: at once, and ever more seldom from who takes it back each time.

An agent that is started again, for an upgrade say, takes the path once or twice. Who takes it again and again is
started by somebody who wants it to have the path, or never comes up: each taking is a reload of HAProxy, and a fight
helps nobody's guests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_WINDOW_S: Final = 60.0
_AT_ONCE: Final = 3
"""So many within the window need no pause; two are what an upgrade of an agent takes."""

_FIRST_PAUSE_S: Final = 15.0
_LAST_PAUSE_S: Final = 600.0


@dataclass(frozen=True, slots=True)
class Takings:
    """The takings that still count.

    Attributes:
        times: Seconds of one clock, the oldest first.
        pause_s: How long after the last of them the path is left to who takes it back.
    """

    times: tuple[float, ...] = ()
    pause_s: float = 0.0


def note_taking(takings: Takings, now: float) -> Takings:
    """The takings with one more.

    Args:
        takings: Those before.
        now: When; not before the last of them.
    """
    times = (*(one for one in takings.times if now - one < _WINDOW_S), now)
    # Nobody has been heard of for a window beyond the pause: whoever fought has stopped.
    calm = not takings.times or now - takings.times[-1] >= takings.pause_s + _WINDOW_S
    if takings.pause_s and not calm:
        return Takings(times, min(takings.pause_s * 2, _LAST_PAUSE_S))
    return Takings(times, _FIRST_PAUSE_S if len(times) >= _AT_ONCE else 0.0)


def pause_left_s(takings: Takings, now: float) -> float:
    """Seconds for which the path is still left to who has it; 0 when it may be taken."""
    if not takings.times:
        return 0.0
    return max(0.0, takings.times[-1] + takings.pause_s - now)
