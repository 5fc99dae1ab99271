"""inotify(7), which the standard library lacks."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

IN_MODIFY: Final = 0x2
IN_ATTRIB: Final = 0x4
IN_CLOSE_WRITE: Final = 0x8
IN_MOVED_FROM: Final = 0x40
IN_MOVED_TO: Final = 0x80
IN_CREATE: Final = 0x100
IN_DELETE: Final = 0x200
IN_DELETE_SELF: Final = 0x400
IN_MOVE_SELF: Final = 0x800
IN_UNMOUNT: Final = 0x2000
IN_Q_OVERFLOW: Final = 0x4000
IN_IGNORED: Final = 0x8000

ENTRIES: Final = IN_MOVED_FROM | IN_MOVED_TO | IN_CREATE | IN_DELETE
"""Names in a directory come and go."""

ITSELF: Final = IN_DELETE_SELF | IN_MOVE_SELF
"""The directory itself goes."""

_EVENT: Final = struct.Struct("=iIII")
_READ_BYTES: Final = 64 * 1024

_libc = ctypes.CDLL(None, use_errno=True)


class Inotify:
    """An inotify instance that is read without blocking.

    Attributes:
        descriptor: Readable when there are events.

    Raises:
        OSError: EMFILE: the user's instances are used up (`fs.inotify.max_user_instances`), not descriptors.
    """

    def __init__(self) -> None:
        self.descriptor = _checked(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))

    def add(self, path: Path, mask: int) -> int:
        """Watch a directory; the number by which its events are known.

        Raises:
            OSError: It does not exist, or the user's watches are used up (ENOSPC).
        """
        name = os.fsencode(path)
        return _checked(_libc.inotify_add_watch(self.descriptor, name, ctypes.c_uint32(mask)))

    def remove(self, watch: int) -> None:
        """End a watch; one that has ended by itself is no error."""
        _libc.inotify_rm_watch(self.descriptor, watch)

    def read(self) -> Iterator[tuple[int, int, str]]:
        """Watch, mask and name in the directory (empty for itself) of each event so far."""
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
        """End all watches."""
        os.close(self.descriptor)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
