"""Notices named namespaces as they come and go.

inotify reports names, but IN_CREATE comes before the mount that makes the name a namespace, and inotify does not report
mounts. `/proc/self/mountinfo` does, by POLLPRI, without saying which: names that are still pending are tried again,
and a scan of the whole directory, at most every half second, finds what no event reported (a mount upon an existing
name, an overflow of the queue).
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Self, TypeAlias

from imdsproxy.core.hoststate import NamespaceRef
from imdsproxy.host.events import Stream
from imdsproxy.host.inotify import (
    ENTRIES,
    IN_DELETE,
    IN_IGNORED,
    IN_MOVED_FROM,
    IN_Q_OVERFLOW,
    IN_UNMOUNT,
    ITSELF,
    Inotify,
)
from imdsproxy.host.namespaces import NamespaceDirectory
from imdsproxy.host.refusal import host_refused

_RESCAN_DELAY_S: Final = 0.5


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
            self._inotify = Inotify()
            self._mounts = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
            # An epoll of our own, since asyncio knows no POLLPRI.
            self._epoll = select.epoll()
            self._epoll.register(self._inotify.descriptor, select.EPOLLIN)
            self._epoll.register(self._mounts, select.EPOLLPRI | select.EPOLLERR)
        except OSError as error:
            # EMFILE of inotify_init is about its instances, not about descriptors.
            hint = "raise fs.inotify.max_user_instances" if error.errno == errno.EMFILE else ""
            raise host_refused("watch the network namespaces", error, hint=hint) from error
        self._follow()
        self._current = self._directory.namespaces()
        self._pending = set(self._directory.names()) - self._current.keys()
        self._loop.add_reader(self._epoll.fileno(), self.attempt, self._take)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._loop.remove_reader(self._epoll.fileno())
        if self._rescan is not None:
            self._rescan.cancel()
        self._epoll.close()
        os.close(self._mounts)
        self._inotify.close()

    def _take(self) -> None:
        # asyncio's own epoll has looked at ours to learn that it is ready, and with that the mount
        # event is used up: being called at all is the event.
        self._epoll.poll(0)
        for watch, mask, name in self._inotify.read():
            if mask & IN_Q_OVERFLOW or watch != self._watch or mask & ITSELF:
                self._look()
            elif mask & (IN_UNMOUNT | IN_IGNORED):
                self._watched = None
                self._look()
            else:
                self._entry(name, replaced=bool(mask & (IN_DELETE | IN_MOVED_FROM)))
        for name in sorted(self._pending):
            self._entry(name)
        if self._rescan is None:
            self._rescan = self._loop.call_later(self._rescan_delay_s, self._look_later)

    def _entry(self, name: str, *, replaced: bool = False) -> None:
        """Check what a name leads to now, and report a change.

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
            self.put(NamespaceWent(before))
        if now is not None:
            self._current[name] = now
            self.put(NamespaceCame(now))

    def _look_later(self) -> None:
        self._rescan = None
        self.attempt(self._look)

    def _look(self) -> None:
        """Look at the whole directory."""
        self._follow()
        for name in sorted({*self._directory.names(), *self._current, *self._pending}):
            self._entry(name)

    def _follow(self) -> None:
        """Put the inotify watch on the directory, or on its nearest parent that exists."""
        for place in (self._directory.path, *self._directory.path.parents):
            try:
                status = place.stat()
                if (status.st_dev, status.st_ino) == self._watched:
                    return
                watch = self._inotify.add(place, ENTRIES | ITSELF)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                raise host_refused(f"watch {place}", error) from error
            if self._watched is not None and self._watch != watch:
                self._inotify.remove(self._watch)
            self._watched = (status.st_dev, status.st_ino)
            self._watch = watch
            return
