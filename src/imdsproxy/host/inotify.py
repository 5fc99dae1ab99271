"""Binding of inotify(7), which the standard library lacks: its events, and a wait for changes in directories."""

import asyncio
import contextlib
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from imdsproxy.host.process import call_libc, readable

IN_MODIFY: Final = 0x2
IN_ATTRIB: Final = 0x4
IN_CLOSE_WRITE: Final = 0x8
IN_MOVED_FROM: Final = 0x40
IN_MOVED_TO: Final = 0x80
IN_CREATE: Final = 0x100
IN_DELETE: Final = 0x200
IN_DELETE_SELF: Final = 0x400
IN_MOVE_SELF: Final = 0x800
IN_Q_OVERFLOW: Final = 0x4000

ENTRIES: Final = IN_MOVED_FROM | IN_MOVED_TO | IN_CREATE | IN_DELETE
"""Events of names that are added to or removed from a directory."""

ITSELF: Final = IN_DELETE_SELF | IN_MOVE_SELF
"""Events of the directory's own removal."""

_EVENT: Final = struct.Struct("=iIII")
_READ_BYTES: Final = 64 * 1024

_CHANGES: Final = IN_MODIFY | IN_ATTRIB | IN_CLOSE_WRITE | ENTRIES | ITSELF

_STEP_S: Final = 0.04
"""Quiet time after which a change is reported, in seconds, because writers write in several steps."""

_LONGEST_S: Final = 0.2
"""Longest time from the first change to the report, in seconds."""


class Inotify:
    """Non-blocking inotify instance, whose descriptor is readable when there are events.

    Raises `OSError` (EMFILE) if the user's inotify instances are used up (`fs.inotify.max_user_instances`).
    """

    def __init__(self) -> None:
        self.descriptor = call_libc("inotify_init1", os.O_NONBLOCK | os.O_CLOEXEC)

    def add(self, path: Path, mask: int) -> int:
        """Watch a directory; return the number that identifies its events.

        Raises `OSError` if the directory does not exist, or the user's watches are used up (ENOSPC).
        """
        return call_libc("inotify_add_watch", self.descriptor, os.fsencode(path), mask)

    def read(self) -> Iterator[tuple[int, int, str]]:
        """Yield watch, mask and name (empty for the directory itself) of each event so far."""
        with contextlib.suppress(BlockingIOError):
            while True:
                data = os.read(self.descriptor, _READ_BYTES)
                offset = 0
                while offset < len(data):
                    watch, mask, _, length = _EVENT.unpack_from(data, offset)
                    offset += _EVENT.size
                    name = data[offset : offset + length].rstrip(b"\0")
                    offset += length
                    yield watch, mask, os.fsdecode(name)

    def close(self) -> None:
        os.close(self.descriptor)


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Directory as it is now: if it is created again under the same name, it is another place, with a new watch."""

    path: Path
    device: int
    inode: int


def place_of(path: Path) -> Place:
    """Return the nearest existing directory at or above `path`."""
    for candidate in (path, *path.parents):
        try:
            status = candidate.stat()
        except OSError:
            continue
        if candidate.is_dir():
            return Place(candidate, status.st_dev, status.st_ino)
    return place_of(Path("/"))


class Watch(Inotify):
    """Watch of directories (not of their subdirectories) from its creation until `close`.

    Raises `OSError` if a directory has vanished, or the kernel's limits on inotify are reached.
    """

    def __init__(self, places: Iterable[Place]) -> None:
        super().__init__()
        self.places = frozenset(places)
        try:
            self._paths = {self.add(one.path, _CHANGES): one.path for one in self.places}
        except OSError:
            self.close()
            raise

    async def changes(self, timeout_s: float | None) -> frozenset[Path]:
        """Wait for changed paths and return them; none after `timeout_s` (`None`: no limit), or if events were lost."""
        if not await self._is_readable(timeout_s):
            return frozenset()
        end = asyncio.get_running_loop().time() + _LONGEST_S
        found: set[Path] = set()
        lost = False
        while True:
            for watch, mask, name in self.read():
                lost = lost or bool(mask & IN_Q_OVERFLOW)
                if watch in self._paths:
                    found.add(self._paths[watch] / name)
            rest = end - asyncio.get_running_loop().time()
            if rest <= 0 or not await self._is_readable(min(_STEP_S, rest)):
                return frozenset() if lost else frozenset(found)

    async def _is_readable(self, timeout_s: float | None) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await readable(self.descriptor)
                return True
        return False
