"""Wait until something changes in some directories."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from imdsproxy.host.inotify import (
    ENTRIES,
    IN_ATTRIB,
    IN_CLOSE_WRITE,
    IN_MODIFY,
    IN_Q_OVERFLOW,
    ITSELF,
    Inotify,
)

_CHANGES: Final = IN_MODIFY | IN_ATTRIB | IN_CLOSE_WRITE | ENTRIES | ITSELF

_STEP_S: Final = 0.04
"""A change is reported when nothing else has changed for so long, for writers write in several steps."""

_LONGEST_S: Final = 0.2
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
        self._inotify = Inotify()
        try:
            self._paths = {
                self._inotify.add(place.path, _CHANGES): place.path for place in self.places
            }
        except OSError:
            self._inotify.close()
            raise

    async def changes(self, timeout_s: float | None) -> frozenset[Path]:
        """The paths that have changed; none after `timeout_s`, or where events were lost. Without it waits for ever."""
        if not await self._is_readable(timeout_s):
            return frozenset()
        end = asyncio.get_running_loop().time() + _LONGEST_S
        found: set[Path] = set()
        lost = False
        while True:
            for watch, mask, name in self._inotify.read():
                lost = lost or bool(mask & IN_Q_OVERFLOW)
                if watch in self._paths:
                    found.add(self._paths[watch] / name)
            rest = end - asyncio.get_running_loop().time()
            if rest <= 0 or not await self._is_readable(min(_STEP_S, rest)):
                return frozenset() if lost else frozenset(found)

    async def _is_readable(self, timeout_s: float | None) -> bool:
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        loop.add_reader(self._inotify.descriptor, ready.set)
        try:
            async with asyncio.timeout(timeout_s):
                await ready.wait()
        except TimeoutError:
            return False
        finally:
            loop.remove_reader(self._inotify.descriptor)
        return True

    def close(self) -> None:
        """Stop watching."""
        self._inotify.close()
