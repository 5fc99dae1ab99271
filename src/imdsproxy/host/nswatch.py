"""Notices named namespaces as they come and go.

inotify tells of names, but IN_CREATE comes before the mount that makes the name a namespace, and
nothing in inotify tells of mounts. `/proc/self/mountinfo` does, by POLLPRI, without saying which:
names that are still pending are tried again, and a look at the whole directory, at most every half
second, finds what no event told (a mount upon an existing name, an overflow of the queue).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import select
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeAlias

from imdsproxy.core.hoststate import NamespaceRef
from imdsproxy.host.namespaces import NamespaceDirectory
from imdsproxy.host.refusal import host_refused
from imdsproxy.host.stream import Stream

_IN_MOVED_FROM: Final = 0x40
_IN_MOVED_TO: Final = 0x80
_IN_CREATE: Final = 0x100
_IN_DELETE: Final = 0x200
_IN_DELETE_SELF: Final = 0x400
_IN_MOVE_SELF: Final = 0x800
_IN_UNMOUNT: Final = 0x2000
_IN_Q_OVERFLOW: Final = 0x4000
_IN_IGNORED: Final = 0x8000
_ENTRIES: Final = _IN_MOVED_FROM | _IN_MOVED_TO | _IN_CREATE | _IN_DELETE
_SELF: Final = _IN_DELETE_SELF | _IN_MOVE_SELF
_EVENT: Final = struct.Struct("=iIII")
_READ_BYTES: Final = 64 * 1024

_RESCAN_DELAY_S: Final = 0.5

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class NamespaceCame:
    """A name leads to a namespace now."""

    ref: NamespaceRef


@dataclass(frozen=True, slots=True)
class NamespaceWent:
    """A name does not lead to that namespace any more; its sockets may keep the namespace alive."""

    ref: NamespaceRef


NamespaceChange: TypeAlias = NamespaceCame | NamespaceWent


class NamespaceWatch(Stream[NamespaceChange]):
    """The namespaces of a directory, kept up to date. An asynchronous context manager.

    The directory need not exist yet.

    Args:
        directory: What to watch.
        rescan_delay_s: At most so long after an event the whole directory is looked at.
    """

    def __init__(
        self, directory: NamespaceDirectory, *, rescan_delay_s: float = _RESCAN_DELAY_S
    ) -> None:
        super().__init__()
        self._directory = directory
        self._rescan_delay_s = rescan_delay_s
        self._current: dict[str, NamespaceRef] = {}
        self._pending: set[str] = set()
        self._rescan: asyncio.TimerHandle | None = None
        self._watched: tuple[int, int] | None = None
        self._watch = -1

    @property
    def current(self) -> Mapping[str, NamespaceRef]:
        """Every usable namespace by name, as of now."""
        return self._current

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        try:
            self._inotify = _inotify_init()
            self._mounts = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
            # An epoll of our own, since asyncio knows no POLLPRI.
            self._epoll = select.epoll()
            self._epoll.register(self._inotify, select.EPOLLIN)
            self._epoll.register(self._mounts, select.EPOLLPRI | select.EPOLLERR)
        except OSError as error:
            # EMFILE of inotify_init is about its instances, not about descriptors.
            hint = "raise fs.inotify.max_user_instances" if error.errno == errno.EMFILE else ""
            raise host_refused("watch the network namespaces", error, hint=hint) from error
        self._follow()
        self._current = self._directory.namespaces()
        self._pending = set(self._directory.names()) - self._current.keys()
        self._loop.add_reader(self._epoll.fileno(), self._ready)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._loop.remove_reader(self._epoll.fileno())
        if self._rescan is not None:
            self._rescan.cancel()
        self._epoll.close()
        os.close(self._mounts)
        os.close(self._inotify)

    def _ready(self) -> None:
        self._attempt(self._take)

    def _take(self) -> None:
        # asyncio's own epoll has looked at ours to learn that it is ready, and with that the mount
        # event is used up: being called at all is the event.
        self._epoll.poll(0)
        for watch, mask, name in self._read():
            if mask & _IN_Q_OVERFLOW or watch != self._watch or mask & _SELF:
                self._look()
            elif mask & (_IN_UNMOUNT | _IN_IGNORED):
                self._watched = None
                self._look()
            else:
                self._entry(name, replaced=bool(mask & (_IN_DELETE | _IN_MOVED_FROM)))
        for name in sorted(self._pending):
            self._entry(name)
        if self._rescan is None:
            self._rescan = self._loop.call_later(self._rescan_delay_s, self._look_later)

    def _read(self) -> Iterator[tuple[int, int, str]]:
        with contextlib.suppress(BlockingIOError):
            while True:
                data = os.read(self._inotify, _READ_BYTES)
                offset = 0
                while offset < len(data):
                    watch, mask, _, length = _EVENT.unpack_from(data, offset)
                    offset += _EVENT.size
                    name = data[offset : offset + length].rstrip(b"\0")
                    offset += length
                    yield watch, mask, os.fsdecode(name)

    def _entry(self, name: str, *, replaced: bool = False) -> None:
        """See what a name leads to now, and tell when that is something else than before.

        Args:
            name: In the directory.
            replaced: It has been removed since it was last looked at. When it leads to a namespace
                all the same, that is another one, though the kernel may have used the inode again.
        """
        before, now = self._current.get(name), self._directory.identity(name)
        if now is None and os.path.lexists(self._directory.path / name):
            self._pending.add(name)
        else:
            self._pending.discard(name)
        if before == now and not (replaced and now is not None):
            return
        if before is not None:
            del self._current[name]
            self._tell(NamespaceWent(before))
        if now is not None:
            self._current[name] = now
            self._tell(NamespaceCame(now))

    def _look_later(self) -> None:
        self._rescan = None
        self._attempt(self._look)

    def _look(self) -> None:
        """Look at the whole directory."""
        self._follow()
        for name in sorted({*self._directory.names(), *self._current, *self._pending}):
            self._entry(name)

    def _follow(self) -> None:
        """Have the inotify watch on the directory, or on its nearest parent that exists."""
        for place in (self._directory.path, *self._directory.path.parents):
            try:
                status = place.stat()
                if (status.st_dev, status.st_ino) == self._watched:
                    return
                watch = _inotify_add(self._inotify, place)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                raise host_refused(f"watch {place}", error) from error
            if self._watched is not None and self._watch != watch:
                _inotify_remove(self._inotify, self._watch)
            self._watched = (status.st_dev, status.st_ino)
            self._watch = watch
            return


def _inotify_init() -> int:
    return _checked(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))


def _inotify_add(descriptor: int, path: Path) -> int:
    return _checked(
        _libc.inotify_add_watch(descriptor, os.fsencode(path), ctypes.c_uint32(_ENTRIES | _SELF))
    )


def _inotify_remove(descriptor: int, watch: int) -> None:
    # A watch that has ended by itself is EINVAL, which is as good.
    _libc.inotify_rm_watch(descriptor, watch)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
