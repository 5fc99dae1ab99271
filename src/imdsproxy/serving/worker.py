"""One worker process of the document server."""

from __future__ import annotations

import asyncio
import concurrent.futures.thread  # noqa: F401 - see below
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog
import uvicorn.lifespan.off  # noqa: F401 - see below

from imdsproxy.serving.asgi import documents_app
from imdsproxy.serving.documents import DocumentService
from imdsproxy.serving.listen import HttpListener
from imdsproxy.serving.passwords import PasswordStore
from imdsproxy.serving.store import RecordReader

# Libraries import the modules marked above when they first need them. Here that is too late: an unprivileged
# worker may not be able to read them, and after an upgrade they would not fit the rest.

_GRACE_S: Final = 5.0
_ORPHAN_POLL_S: Final = 0.2


@dataclass(frozen=True, slots=True)
class Place:
    """A listening socket and the file it is found by (device and inode tell whether it still is)."""

    path: Path
    listener: socket.socket
    identity: tuple[int, int]

    def is_ours(self) -> bool:
        """Whether clients that connect to the path still come to this socket."""
        try:
            status = self.path.stat()
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == self.identity


@dataclass(frozen=True, slots=True)
class WorkerTask:
    """What a worker needs to know.

    Attributes:
        parent: The reading end of a pipe that is never written: it ends when the parent does.
        announce: Called once, when requests are answered.
    """

    place: Place
    records: Path
    passwords: Path
    cache_bytes: int
    parent: int
    announce: Callable[[], None]


def run_worker(task: WorkerTask) -> None:
    """Serve until SIGTERM, then finish what is begun.

    A worker whose parent is gone (killed) serves on, until another one listens in its place.
    """
    asyncio.run(_serve(task))


async def _serve(task: WorkerTask) -> None:
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, over.set)
    orphaned = asyncio.Event()
    loop.add_reader(task.parent, _note_end, loop, task.parent, orphaned)
    service = DocumentService(
        RecordReader(task.records, capacity=task.cache_bytes), PasswordStore(task.passwords)
    )
    http = HttpListener(documents_app(service))
    await http.open(task.place.listener)
    task.announce()
    succession = loop.create_task(_end_when_replaced(task.place, orphaned, over))
    await over.wait()
    succession.cancel()
    await http.close(grace_s=_GRACE_S)


def _note_end(loop: asyncio.AbstractEventLoop, parent: int, orphaned: asyncio.Event) -> None:
    loop.remove_reader(parent)
    os.close(parent)
    orphaned.set()


async def _end_when_replaced(place: Place, orphaned: asyncio.Event, over: asyncio.Event) -> None:
    await orphaned.wait()
    log = structlog.get_logger()
    log.warning("the document server's parent is gone; serving on", socket=str(place.path))
    while place.is_ours():  # noqa: ASYNC110 - the file system is what changes
        await asyncio.sleep(_ORPHAN_POLL_S)
    log.info("another document server has taken over", socket=str(place.path))
    over.set()
