"""The two threads that libvirt's C library needs: one that calls it, one that runs its event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Final, Protocol, TypeAlias, TypeVar

__all__ = ["CallThread", "EventLoopImplementation", "EventThread"]

_T = TypeVar("_T")
_Job: TypeAlias = "Callable[[], None] | None"


class CallThread:
    """Runs blocking calls one after the other, off the event loop's thread.

    It is a daemon thread, not one of a pool: a call to a libvirtd that hangs never returns, and Python would wait for
    a pool's threads at its end.
    """

    def __init__(self) -> None:
        self._jobs: SimpleQueue[_Job] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="imdsproxy-libvirt", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it still runs, or hangs in a call."""
        return self._thread.is_alive()

    def call(self, work: Callable[[], _T]) -> asyncio.Future[_T]:
        """The result of `work`, or what it raises; begun in the order of the calls."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_T] = loop.create_future()

        def job() -> None:
            try:
                result = work()
            except Exception as error:  # noqa: BLE001 - handed to who waits
                _hand_over(loop, _settle, future, None, error)
            else:
                _hand_over(loop, _settle, future, result, None)

        self._jobs.put(job)
        return future

    def end(self) -> None:
        """End after what was asked for so far; does not wait."""
        self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


def _settle(future: asyncio.Future[_T], result: _T, error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def _hand_over(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *given: object) -> None:
    # A loop that is closed has nobody who waits.
    if not loop.is_closed():
        loop.call_soon_threadsafe(call, *given)


class EventLoopImplementation(Protocol):
    """What of the module `libvirt` runs its event loop."""

    def virEventRegisterDefaultImpl(self) -> None: ...  # noqa: D102, N802 - libvirt's name

    def virEventRunDefaultImpl(self) -> None: ...  # noqa: D102, N802 - libvirt's name

    def virEventAddTimeout(  # noqa: D102, N802 - libvirt's name
        self, timeout: int, cb: Callable[[int, object], None], opaque: object
    ) -> int: ...

    def virEventUpdateTimeout(self, timer: int, timeout: int) -> None: ...  # noqa: D102, N802 - libvirt's name


_NEVER: Final = -1
_AT_ONCE: Final = 0


class EventThread:
    """Libvirt's event loop, of which a process has one, while somebody needs it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._thread: threading.Thread | None = None
        self._timer: int | None = None
        self._ending = threading.Event()

    def start(self, library: EventLoopImplementation) -> None:
        """Run it; before the first connection is made."""
        with self._lock:
            self._users += 1
            if self._thread is not None:
                return
            if self._timer is None:
                # Once in the life of a process: libvirt has no way to take it back.
                library.virEventRegisterDefaultImpl()
                self._timer = library.virEventAddTimeout(_NEVER, lambda *_: None, None)
            self._ending.clear()
            self._thread = threading.Thread(
                target=self._run, args=(library,), name="imdsproxy-libvirt-events", daemon=True
            )
            self._thread.start()

    def stop(self, library: EventLoopImplementation) -> None:
        """Let it end when nobody needs it any more; waits for that."""
        with self._lock:
            self._users -= 1
            if self._users or self._thread is None or self._timer is None:
                return
            self._ending.set()
            library.virEventUpdateTimeout(self._timer, _AT_ONCE)
            self._thread.join()
            library.virEventUpdateTimeout(self._timer, _NEVER)
            self._thread = None

    def _run(self, library: EventLoopImplementation) -> None:
        while not self._ending.is_set():
            library.virEventRunDefaultImpl()
