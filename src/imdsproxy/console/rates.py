"""How much guests asked for lately: kept by the console while their pages are open, and drawn as a small line."""

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
    """The last numbers of the guests that were looked at last."""

    _numbers: OrderedDict[str, deque[int]] = field(default_factory=OrderedDict)
    _lock: Lock = field(default_factory=Lock)

    def add(self, guest: str, number: int) -> Sequence[int]:
        """Note a number; all that are known of this guest, the newest last."""
        with self._lock:
            kept = self._numbers.pop(guest, None) or deque(maxlen=_KEPT)
            kept.append(number)
            self._numbers[guest] = kept
            while len(self._numbers) > _GUESTS:
                self._numbers.popitem(last=False)
            return tuple(kept)


def draw_line(numbers: Sequence[int], most: int) -> str:
    """The points of an SVG's polyline: the newest at the right edge, as high as its share of the most seen.

    Args:
        numbers: Of equal times.
        most: Drawn at the top, unless a number is higher.
    """
    highest, step = max(most, *numbers), WIDTH / (_KEPT - 1)
    begin = WIDTH - step * (len(numbers) - 1)
    return " ".join(
        f"{begin + step * place:.1f},{HEIGHT - 2 - (HEIGHT - 4) * number / highest:.1f}"
        for place, number in enumerate(numbers)
    )
