"""Wait until something changes in some directories (inotify, by watchfiles' Rust part)."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

# Documented as the library's lower layer (https://watchfiles.helpmanual.io/api/rust_backend/); its
# `awatch` begins to watch at an unknown moment, so that a change just before would be missed.
from watchfiles._rust_notify import RustNotify

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Place", "Watch", "place_of"]

_STEP_MS: Final = 40
"""A change is told when nothing else has changed for so long, for writers write in several steps;
it is also how often the Rust part looks, which costs 0.1 % of a core."""

_LONGEST_MS: Final = 200
"""And at the latest so long after the first one."""


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """A directory as it is now: one made again under the same name is another, and watched anew."""

    path: Path
    device: int
    inode: int


def place_of(path: Path) -> Place:
    """The nearest directory at or above `path` that exists."""
    for candidate in (path, *path.parents):
        try:
            status = candidate.stat()
        except OSError:
            continue
        if candidate.is_dir():
            return Place(candidate, status.st_dev, status.st_ino)
    return place_of(Path("/"))


class Watch:
    """Watches directories (not what is below them) from its making until `close`.

    Raises:
        OSError: A directory is gone again, or the kernel's limits on inotify are reached.
    """

    def __init__(self, places: Iterable[Place]) -> None:
        self.places = frozenset(places)
        self._notify = RustNotify(
            sorted({str(place.path) for place in self.places}),
            False,
            False,
            0,
            False,
            True,
        )
        self._stop = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="imdsproxy-watch")

    async def changes(self, timeout_s: float | None) -> frozenset[Path]:
        """The paths that have changed, none after `timeout_s`; waits for ever without it."""
        timeout_ms = 0 if timeout_s is None else max(1, round(timeout_s * 1000))
        waiting = asyncio.get_running_loop().run_in_executor(
            self._thread, self._notify.watch, _LONGEST_MS, _STEP_MS, timeout_ms, self._stop
        )
        try:
            found = await asyncio.shield(waiting)
        except asyncio.CancelledError:
            # The thread must have left the Rust part before that is closed.
            self._stop.set()
            await asyncio.wait((waiting,))
            raise
        if isinstance(found, str):
            return frozenset()
        return frozenset(Path(path) for _kind, path in found)

    def close(self) -> None:
        """Stop watching."""
        self._stop.set()
        self._thread.shutdown(wait=True)
        self._notify.close()
