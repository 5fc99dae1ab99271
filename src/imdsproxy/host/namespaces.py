"""Named network namespaces, as `ip netns` has them (a bind mount of nsfs under /run/netns).

The inode of the nsfs file identifies a namespace: a reused name has another inode. Each thread has its own network
namespace, so one worker thread does everything that must happen inside: it enters, works and returns
(`NamespaceThread`).
"""

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from imdsproxy.errors import HostRefused, Ignoring, host_refused, refusing
from imdsproxy.host.files import opened, remove_file
from imdsproxy.host.process import call_libc
from imdsproxy.host.state import NamespaceRef

DEFAULT_DIRECTORY: Final = Path("/run/netns")

_CLONE_NEWNET: Final = 0x40000000
_MS_BIND: Final = 0x1000
_MS_REC: Final = 0x4000
_MS_SHARED: Final = 0x100000
_MNT_DETACH: Final = 2
_SELF: Final = "/proc/thread-self/ns/net"
MISSING: Final = (FileNotFoundError, NotADirectoryError)

T = TypeVar("T")


def unshare_network() -> None:
    """Move the calling thread to a new network namespace, which ends with the thread unless it is held open."""
    call_libc("unshare", _CLONE_NEWNET)


def _mount(source: str, target: Path, flags: int) -> None:
    call_libc("mount", source.encode(), os.fsencode(target), b"none", ctypes.c_ulong(flags), None)


class NamespaceMissing(FileNotFoundError):
    """Raised if no namespace has the name."""


@dataclass(frozen=True, slots=True)
class OpenNamespace:
    """Open namespace: until `close` it cannot vanish, and its name always means this one."""

    ref: NamespaceRef
    descriptor: int

    def close(self) -> None:
        """Close the descriptor: while it is open, a deleted namespace and its interfaces stay alive."""
        os.close(self.descriptor)


class NamespaceDirectory:
    """Directory of named namespaces, `/run/netns` unless in a test."""

    def __init__(self, path: Path = DEFAULT_DIRECTORY) -> None:
        self.path = path
        self._base = os.fspath(path)
        # All nsfs files of a kernel share one super block. Comparing its device number with our own namespace's is as
        # good as fstatfs's magic (0x6e736673), and needs no foreign call.
        self._device = Path("/proc/self/ns/net").stat().st_dev

    def file(self, name: str) -> str:
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise HostRefused(f"{name!r} cannot be the name of a network namespace")
        return f"{self._base}/{name}"

    def identity(self, name: str) -> NamespaceRef | None:
        """Return name and inode of a namespace; `None` if there is none, or it is not mounted yet."""
        try:
            status = os.stat(self.file(name))  # noqa: PTH116 - of every namespace: a Path costs more than the look
        except MISSING:
            return None
        except OSError as error:
            raise host_refused(f"look at namespace {name}", error) from error
        return NamespaceRef(name, status.st_ino) if status.st_dev == self._device else None

    def names(self) -> list[str]:
        """Return every name in the directory, usable or not, sorted; empty if there is no directory."""
        with refusing(f"list {self.path}"), contextlib.suppress(*MISSING):
            return sorted(os.listdir(self.path))  # noqa: PTH208 - names are wanted, not paths
        return []

    def namespaces(self) -> dict[str, NamespaceRef]:
        found = ((name, self.identity(name)) for name in self.names())
        return {name: ref for name, ref in found if ref is not None}

    def open(self, name: str) -> OpenNamespace:
        """Open a namespace and keep it open; raise `NamespaceMissing` if no namespace has that name."""
        with refusing(f"open namespace {name}"), contextlib.suppress(*MISSING):
            descriptor = os.open(self.file(name), os.O_RDONLY | os.O_CLOEXEC)
            status = os.fstat(descriptor)
            if status.st_dev == self._device:
                return OpenNamespace(NamespaceRef(name, status.st_ino), descriptor)
            os.close(descriptor)
        raise NamespaceMissing(errno.ENOENT, f"{os.strerror(errno.ENOENT)}: no namespace {name}")

    def delete(self, name: str) -> bool:
        """Unmount and remove a name, as `ip netns del`; return false if there was none.

        The kernel ends the namespace when no process, socket or descriptor uses it.
        """
        path = Path(self.file(name))
        # EINVAL: the name is no mount point; only a file is left.
        with refusing(f"unmount namespace {name}"), Ignoring(errno.ENOENT, errno.EINVAL):
            call_libc("umount2", os.fsencode(path), _MNT_DETACH)
        return remove_file(path, f"remove namespace {name}")

    def prepare(self) -> None:
        """Create the directory and mark it shared: other mount namespaces get the mounts made here.

        The steps are those of `ip netns add`: first a bind mount upon itself if it is no mount point yet, then
        MS_SHARED. The directory is locked meanwhile, as iproute2 does it.
        """
        with refusing(f"make {self.path} a shared mount"):
            self.path.mkdir(mode=0o755, parents=True, exist_ok=True)
            with opened(self.path, os.O_RDONLY | os.O_DIRECTORY) as descriptor:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                with Ignoring(errno.EINVAL):  # no mount point yet
                    _mount("", self.path, _MS_SHARED | _MS_REC)
                    return
                _mount(str(self.path), self.path, _MS_BIND | _MS_REC)
                _mount("", self.path, _MS_SHARED | _MS_REC)


class NamespaceThread:
    """The thread that enters namespaces.

    Work runs in the order of submission. Each piece begins and ends in the namespace in which the process started.
    Entering and returning takes about 10 µs.
    """

    def __init__(self, directory: NamespaceDirectory) -> None:
        self.directory = directory
        self._home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="namespaces")
        self._closed = False

    def is_home(self, name: str) -> bool:
        """Return whether a name leads to the namespace in which the process started."""
        ref = self.directory.identity(name)
        return ref is not None and ref.inode == os.fstat(self._home).st_ino

    async def run(self, work: Callable[[], T]) -> T:
        """Run blocking work in the thread, in the process's own namespace."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    @contextlib.contextmanager
    def inside(self, name: str | None) -> Iterator[NamespaceRef | None]:
        """Run a block inside a namespace, or at home for `None`; only for code that runs in this thread (`run`).

        Raises `NamespaceMissing` if no namespace has that name; `HostRefused` if the kernel refused, or the thread is
        ending, which looks at namespaces must not delay.
        """
        if self._closed:
            raise HostRefused("the namespace thread is ending")
        if name is None:
            yield None
            return
        with contextlib.closing(self.directory.open(name)) as opened:
            with refusing(f"enter namespace {name}"):
                call_libc("setns", opened.descriptor, _CLONE_NEWNET)
            try:
                yield opened.ref
            finally:
                self._come_home()

    def create_now(self, name: str, prepare: Callable[[], object] = lambda: None) -> NamespaceRef:
        """Create a namespace with this name unless there is one; only for code that already runs in this thread.

        `prepare` is called inside before the namespace gets its name, so that every named namespace is prepared.
        """
        present = self.directory.identity(name)
        if present is not None:
            return present
        # Remove a file without a mount: its creator was killed between the two steps.
        self.directory.delete(name)
        self.directory.prepare()
        path = Path(self.directory.file(name))
        with refusing(f"create namespace {name}"):
            try:
                unshare_network()
                prepare()
                path.touch(mode=0, exist_ok=False)
                try:
                    _mount(_SELF, path, _MS_BIND)
                except OSError:
                    path.unlink()
                    raise
            finally:
                self._come_home()
            return NamespaceRef(name, path.stat().st_ino)

    def _come_home(self) -> None:
        try:
            call_libc("setns", self._home, _CLONE_NEWNET)
        except OSError as error:
            # If the thread went on in another namespace, our sockets would be opened there.
            raise HostRefused(
                "the namespace thread cannot return to the host's own namespace"
            ) from error

    def close(self) -> None:
        """End the thread after its pending work; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._pool.shutdown(wait=True)
        os.close(self._home)
