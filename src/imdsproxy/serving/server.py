"""The document server: a parent that keeps its workers alive, each on its own unix socket.

The parent makes the sockets and holds them open, so a connection to a worker that has just died waits for the
next one instead of being refused. It imports everything before it forks: what the workers share costs once.
It depends on neither the controller nor HAProxy.

SIGTERM and SIGINT stop it, SIGHUP makes it take up new code and settings without losing a connection.
"""

from __future__ import annotations

import asyncio
import concurrent.futures.thread  # noqa: F401 - see below
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import structlog
import uvicorn.lifespan.off  # noqa: F401 - see below

from imdsproxy.errors import ImdsproxyError
from imdsproxy.host.account import Account, find_account
from imdsproxy.host.files import ensure_directory, write_atomic
from imdsproxy.host.notify import ServiceNotifier
from imdsproxy.host.servers import open_unix_socket
from imdsproxy.serving.documents import DocumentService, documents_app
from imdsproxy.serving.http import HttpListener
from imdsproxy.serving.pidfile import PidFile, read_pids
from imdsproxy.serving.store import PasswordStore, RecordReader
from imdsproxy.serving.supervisor import HANDLED_SIGNALS, Ending, Place, Supervisor

# Libraries import the modules marked above when they first need them. Here that is too late: an unprivileged
# worker may not be able to read them, and after an upgrade they would not fit the rest.

_SOCKET_MODE: Final = 0o660
_PRIVATE: Final = 0o750
_CACHE_BYTES: Final = 32 * 1024 * 1024
"""Memory that each worker may spend on parsed records."""

_GRACE_S: Final = 5.0
_ORPHAN_POLL_S: Final = 0.2


@dataclass(frozen=True, slots=True)
class DocumentServerOptions:
    """What a document server is to do.

    Attributes:
        sockets: One path for each worker; their directory must exist.
        records: The directory of compiled records.
        passwords: The directory of guests' passwords; made, and given to the workers' account.
        pid_file: Locked while the server runs; lists the parent and the workers.
        log: Where this process's standard error goes, if that is a file of ours: its size is limited.
        user: Whose account the workers take, if this process is root; `None` keeps the present one.
        group: The workers' group, and that of the sockets; `None` for the user's own.
    """

    sockets: tuple[Path, ...]
    records: Path
    passwords: Path
    pid_file: Path
    log: Path | None = None
    user: str | None = None
    group: str | None = None


def run_documents(
    options: DocumentServerOptions,
    *,
    notifier: ServiceNotifier,
    monotonic: Callable[[], float] = time.monotonic,
) -> None:
    """Be the document server until a signal stops it.

    Args:
        options: What to do.
        notifier: Notified once all workers answer.
        monotonic: The clock of restarts and their back-off.

    Raises:
        HostRefused: Another one runs, a socket cannot be bound, an account does not exist, or no worker comes up.
        PrivilegeMissing: This process may not do that.
    """
    account = find_account(options.user, options.group)
    handover_file = options.pid_file.with_suffix(".handover")
    handover = accept_handover(handover_file)
    if handover is None:
        predecessors = read_pids(options.pid_file).workers
        pid_file = PidFile.claim(options.pid_file)
    else:
        predecessors = handover.workers
        pid_file = PidFile(options.pid_file, handover.lock)
    places = _places(options, account, handover)
    supervisor = Supervisor(
        places,
        serve=partial(run_worker, options, account),
        pid_file=pid_file,
        log=options.log,
        bind=lambda path: _bind(path, account),
        monotonic=monotonic,
    )
    supervisor.start(predecessors)
    if handover is not None:
        os.close(handover.alive)
    notifier.ready(f"{len(places)} workers answer")
    while supervisor.run() is Ending.REPLACE:
        notifier.reloading(int(monotonic() * 1_000_000))
        left = Handover(pid_file.descriptor, supervisor.alive, supervisor.places, supervisor.pids)
        _become_successor(handover_file, left)
        notifier.ready("could not be replaced; see the log")
    supervisor.stop()
    pid_file.release()


def _places(
    options: DocumentServerOptions, account: Account | None, handover: Handover | None
) -> tuple[Place, ...]:
    _have_directory(options.records, None if account is None else (-1, account.group))
    _have_directory(options.passwords, None if account is None else (account.user, account.group))
    inherited = {} if handover is None else {place.path: place for place in handover.places}
    places = []
    for path in options.sockets:
        place = inherited.pop(path, None)
        places.append(place if place is not None and place.is_ours() else _bind(path, account))
    for place in inherited.values():
        place.path.unlink(missing_ok=True)
        place.listener.close()
    return tuple(places)


def _have_directory(path: Path, owner: tuple[int, int] | None) -> None:
    # Without an account to give it to, an existing one keeps its owner and mode.
    if owner is not None or not path.is_dir():
        ensure_directory(path, mode=_PRIVATE, owner=owner)


def _bind(path: Path, account: Account | None) -> Place:
    if not path.parent.is_dir():
        ensure_directory(path.parent)
    group = None if account is None else account.group
    listener = open_unix_socket(path, mode=_SOCKET_MODE, group=group)
    status = path.stat()
    return Place(path, listener, (status.st_dev, status.st_ino))


def _become_successor(handover_file: Path, handover: Handover) -> None:
    """Execute our own command line again; comes back only when that failed."""
    log = structlog.get_logger()
    try:
        write_handover(handover_file, handover)
        log.info("taking up new code and settings")
        # Blocked, a signal waits for the next program's handlers instead of ending it before it has any.
        signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED_SIGNALS)
        os.execv(sys.executable, sys.orig_argv)  # noqa: S606 - our own command line, no shell
    except (OSError, ImdsproxyError) as error:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED_SIGNALS)
        log.error("cannot be replaced; going on as before", reason=str(error))  # noqa: TRY400 - the reason says it all
        handover_file.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Handover:
    """What the predecessor held: same process, same sockets, new program.

    The parent writes it into a file and executes its own command line again. The next program finds the file with its
    own pid in it, forks new workers on the same sockets, and ends the old ones when the new ones answer. No connection
    is refused meanwhile, and the process that a supervisor watches stays.

    Attributes:
        lock: The pid file's descriptor.
        alive: The writing end of the pipe by which its workers know that their parent lives.
        places: Its sockets.
        workers: Its workers, which still serve.
    """

    lock: int
    alive: int
    places: tuple[Place, ...]
    workers: tuple[int, ...]


def write_handover(path: Path, handover: Handover) -> None:
    """Write the file and make the descriptors survive the execution.

    Raises:
        HostRefused: The file cannot be written.
        PrivilegeMissing: This process may not write there.
    """
    sockets = [
        {"path": str(one.path), "descriptor": one.listener.fileno(), "identity": one.identity}
        for one in handover.places
    ]
    # The next program may be of another version.
    text = {
        "pid": os.getpid(),
        "lock": handover.lock,
        "alive": handover.alive,
        "sockets": sockets,
        "workers": handover.workers,
    }
    write_atomic(path, json.dumps(text).encode("ascii"), mode=0o600)
    listeners = (one.listener.fileno() for one in handover.places)
    for descriptor in (handover.lock, handover.alive, *listeners):
        os.set_inheritable(descriptor, True)


def accept_handover(path: Path) -> Handover | None:
    """What this process's former program left, once; `None` when it was started anew."""
    try:
        text = json.loads(path.read_bytes())
    except (OSError, ValueError):
        # Whatever is there was not written for this process in this moment.
        return None
    if not isinstance(text, dict) or text.get("pid") != os.getpid():
        return None
    path.unlink(missing_ok=True)
    places = []
    for one in text["sockets"]:
        listener = socket.socket(fileno=one["descriptor"])
        listener.set_inheritable(False)
        device, inode = one["identity"]
        places.append(Place(Path(one["path"]), listener, (device, inode)))
    for descriptor in (text["lock"], text["alive"]):
        os.set_inheritable(descriptor, False)
    return Handover(text["lock"], text["alive"], tuple(places), tuple(text["workers"]))


def run_worker(
    options: DocumentServerOptions,
    account: Account | None,
    place: Place,
    parent: int,
    announce: Callable[[], None],
) -> None:
    """Be a worker until SIGTERM, then finish what is begun.

    A worker whose parent is gone (killed) serves on, until another one listens in its place.

    Args:
        options: What to serve.
        account: What to become; `None` for what this process is.
        place: The socket.
        parent: The reading end of a pipe that is never written: it ends when the parent does.
        announce: Called once, when requests are answered.
    """
    if account is not None:
        account.assume()
    asyncio.run(_serve(options, place, parent, announce))


async def _serve(
    options: DocumentServerOptions, place: Place, parent: int, announce: Callable[[], None]
) -> None:
    loop = asyncio.get_running_loop()
    over, orphaned = asyncio.Event(), asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, over.set)

    def note_end() -> None:
        loop.remove_reader(parent)
        os.close(parent)
        orphaned.set()

    loop.add_reader(parent, note_end)
    records = RecordReader(options.records, capacity=_CACHE_BYTES)
    http = HttpListener(documents_app(DocumentService(records, PasswordStore(options.passwords))))
    await http.open(place.listener)
    announce()
    succession = loop.create_task(_end_when_replaced(place, orphaned, over))
    await over.wait()
    succession.cancel()
    await http.close(grace_s=_GRACE_S)


async def _end_when_replaced(place: Place, orphaned: asyncio.Event, over: asyncio.Event) -> None:
    await orphaned.wait()
    log = structlog.get_logger()
    log.warning("the document server's parent is gone; serving on", socket=str(place.path))
    while place.is_ours():  # noqa: ASYNC110 - the file system is what changes
        await asyncio.sleep(_ORPHAN_POLL_S)
    log.info("another document server has taken over", socket=str(place.path))
    over.set()
