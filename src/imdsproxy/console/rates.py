"""Recent request rates of guests, sampled while their pages are open, and drawn as a line."""

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Final

_GUESTS: Final = 50
_KEPT: Final = 90
WIDTH: Final = 240
HEIGHT: Final = 48


@dataclass(slots=True)
class Rates:
    """Recent samples of the guests viewed last."""

    _numbers: OrderedDict[str, deque[int]] = field(default_factory=OrderedDict)
    _lock: Lock = field(default_factory=Lock)

    def add(self, guest: str, number: int) -> Sequence[int]:
        """Add a sample; return all samples of this guest, the newest last."""
        with self._lock:
            kept = self._numbers.pop(guest, None) or deque(maxlen=_KEPT)
            kept.append(number)
            self._numbers[guest] = kept
            while len(self._numbers) > _GUESTS:
                self._numbers.popitem(last=False)
            return tuple(kept)


def draw_line(numbers: Sequence[int], most: int) -> str:
    """Return the points of an SVG polyline, with the newest sample at the right edge.

    Args:
        most: Value at the top edge, unless a sample is higher.
    """
    highest, step = max(most, *numbers), WIDTH / (_KEPT - 1)
    begin = WIDTH - step * (len(numbers) - 1)
    return " ".join(
        f"{begin + step * place:.1f},{HEIGHT - 2 - (HEIGHT - 4) * number / highest:.1f}"
        for place, number in enumerate(numbers)
    )
