"""HAProxy's reloads while a test does something else."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Self


class Reloads:
    """HAProxy reloads again and again until the end of the `with` block.

    Args:
        reload: Makes it reload.
        pause_s: Between two calls of it.
        each: Reloads that one call makes.

    Attributes:
        number: How many there were.
    """

    def __init__(self, reload: Callable[[], None], *, pause_s: float, each: int = 1) -> None:
        self._reload = reload
        self._pause_s = pause_s
        self._each = each
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reloads")
        self.number = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._pause_s):
            self._reload()
            self.number += self._each
