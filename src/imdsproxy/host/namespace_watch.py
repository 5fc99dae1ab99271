"""Watch for named network namespaces that are created and removed."""

import asyncio
import contextlib
import errno
import os
import select
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Final, Self

from imdsproxy.errors import host_refused, refusing
from imdsproxy.host.inotify import ENTRIES, IN_DELETE, IN_MOVED_FROM, ITSELF, Inotify
from imdsproxy.host.namespaces import MISSING, NamespaceDirectory
from imdsproxy.host.state import NamespaceRef

_SETTLE_S: Final = 0.01
"""Pause before a scan, in seconds: a namespace is created in several steps, each an event."""

_SHARE: Final = 20
"""Ratio of pauses to scans, which bounds the time spent on scans, however many mounts there are."""

_LONGEST_PAUSE_S: Final = 0.5
"""Longest pause, in seconds, so that a busy host with thousands of namespaces still sees a new one soon."""


@dataclass(eq=False)
class NamespaceWatch:
    """Watch of a directory's namespaces. A context manager, and an asynchronous iterator without an end.

    Each item is a namespace, and whether its name leads to it now. After a removal its sockets may keep it alive. The
    directory need not exist yet.

    A namespace is a mount, or a symbolic link to one. `/proc/self/mountinfo` signals changes of mounts by POLLPRI, and
    inotify those of names, but neither reports the present state: each event leads to a scan of the whole directory.

    Attributes:
        current: Usable namespaces by name, as of the last scan.
    """

    directory: NamespaceDirectory
    current: dict[str, NamespaceRef] = field(default_factory=dict)
    _removed: set[str] = field(default_factory=set)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def __enter__(self) -> Self:
        try:
            self._inotify = Inotify()
            self._mounts = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
            # An own epoll, because asyncio does not support POLLPRI.
            self._epoll = select.epoll()
            self._epoll.register(self._inotify.descriptor, select.EPOLLIN)
            self._epoll.register(self._mounts, select.EPOLLPRI | select.EPOLLERR)
        except OSError as error:
            # EMFILE of inotify_init means too many inotify instances, not descriptors.
            hint = "raise fs.inotify.max_user_instances" if error.errno == errno.EMFILE else ""
            raise host_refused("watch the network namespaces", error, hint=hint) from error
        self._follow()
        self.current = self.directory.namespaces()
        asyncio.get_running_loop().add_reader(self._epoll.fileno(), self._take)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.get_running_loop().remove_reader(self._epoll.fileno())
        self._epoll.close()
        os.close(self._mounts)
        self._inotify.close()

    def _take(self) -> None:
        # asyncio's epoll has polled ours to learn that it is ready, which consumes the mount event: the call itself is
        # the event.
        self._epoll.poll(0)
        self._drain()
        self._changed.set()

    def _drain(self) -> None:
        gone = IN_DELETE | IN_MOVED_FROM
        self._removed.update(name for _, mask, name in self._inotify.read() if mask & gone)

    def look_again(self) -> None:
        """Scan the directory without an event."""
        self._changed.set()

    async def __aiter__(self) -> AsyncIterator[tuple[NamespaceRef, bool]]:
        async for changes in self.scans():
            for change in changes:
                yield change

    async def scans(self) -> AsyncIterator[list[tuple[NamespaceRef, bool]]]:
        time, earliest = asyncio.get_running_loop().time, 0.0
        while True:
            await self._changed.wait()
            await asyncio.sleep(max(_SETTLE_S, earliest - time()))
            self._changed.clear()
            began = time()
            changes = self._scan()
            earliest = time() + min(_SHARE * (time() - began), _LONGEST_PAUSE_S)
            yield changes

    def _scan(self) -> list[tuple[NamespaceRef, bool]]:
        self._follow()
        self._drain()
        before, self.current = self.current, self.directory.namespaces()
        # A name that was removed and created again leads to a new namespace, even if the kernel has reused the inode.
        changed, self._removed = self._removed, set()
        changed |= {name for name, _ in before.items() ^ self.current.items()}
        gone = [(ref, False) for name, ref in before.items() if name in changed]
        return gone + [(ref, True) for name, ref in self.current.items() if name in changed]

    def _follow(self) -> None:
        """Watch the directory, or its nearest existing parent, by inotify; a repeated call changes nothing."""
        for place in (self.directory.path, *self.directory.path.parents):
            with refusing(f"watch {place}"), contextlib.suppress(*MISSING):
                self._inotify.add(place, ENTRIES | ITSELF)
                return
