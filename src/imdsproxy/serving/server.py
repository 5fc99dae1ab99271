"""The document server: a parent that keeps its workers alive, each on its own unix socket.

The parent makes the sockets and holds them open, so a connection to a worker that has just died waits for the
next one instead of being refused. It imports everything before it forks: what the workers share costs once.
It depends on neither the controller nor HAProxy.

SIGTERM and SIGINT stop it, SIGHUP makes it take up new code and settings without losing a connection.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from imdsproxy.errors import ImdsproxyError
from imdsproxy.host.files import ensure_directory
from imdsproxy.host.notify import ServiceNotifier
from imdsproxy.serving.account import Account, find_account
from imdsproxy.serving.bind import open_unix_socket
from imdsproxy.serving.handover import Handover, accept_handover, write_handover
from imdsproxy.serving.pidfile import PidFile, read_pids
from imdsproxy.serving.supervisor import HANDLED_SIGNALS, Ending, Supervisor
from imdsproxy.serving.worker import Place

_SOCKET_MODE = 0o660
_PRIVATE = 0o750


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
        cache_bytes: Memory that each worker may spend on parsed records.
    """

    sockets: tuple[Path, ...]
    records: Path
    passwords: Path
    pid_file: Path
    log: Path | None = None
    user: str | None = None
    group: str | None = None
    cache_bytes: int = 32 * 1024 * 1024


def run_documents(
    options: DocumentServerOptions,
    *,
    notifier: ServiceNotifier | None = None,
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
        records=options.records,
        passwords=options.passwords,
        cache_bytes=options.cache_bytes,
        account=account,
        pid_file=pid_file,
        log=options.log,
        bind=lambda path: _bind(path, account),
        monotonic=monotonic,
    )
    supervisor.start(predecessors)
    if handover is not None:
        os.close(handover.alive)
    notifier = notifier or ServiceNotifier()
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
