"""Start of the two processes for identity tokens, with plain values instead of settings.

The command reads the settings and executes this module: so neither process keeps the memory of the settings' schema.
"""

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn

if __name__ == "__main__":
    # For tracebacks on a terminal structlog would import rich, which takes 5 MB in each process.
    sys.modules["rich"] = None  # type: ignore[assignment] # Python's own sign for a module that is not to be had

import structlog

from imdsproxy.documents.pidfile import PidFile
from imdsproxy.errors import HostRefused, ImdsproxyError
from imdsproxy.host.account import Account
from imdsproxy.host.clock import Clock
from imdsproxy.host.files import ensure_directory
from imdsproxy.host.logs import open_logging
from imdsproxy.host.notify import ServiceNotifier, is_journal
from imdsproxy.host.owned_files import give_files
from imdsproxy.host.process import leave_no_dumps
from imdsproxy.host.servers import open_unix_socket

_LOOK_EVERY_S: Final = 1.0
_PRIVATE: Final = 0o700
_log: Final = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Plan:
    """Values of one of the processes; paths as text.

    Attributes:
        socket: Socket of the process.
        clients: Group that may connect.
        signer: Socket of the signer of this host, for the process that answers guests.
        fleet: Directory of the host's certificate for its fleet, for the process that answers guests.
        keys: Directory of the keys, for the signer; empty for the other process.
        key_file: File of the operator's keys, for the signer; empty lets the signer make keys.
        subjects: Directory of subjects; empty for the signer of a hub, which brings subjects and keys.
        managers: Accounts that may manage the keys, for the signer.
        audiences: Keyword arguments of `claims.AudienceRules`, by audience.
    """

    socket: str
    pid_file: str
    log_level: str
    log_format: str
    user: int | None
    group: int | None
    clients: int
    subjects: str
    signer: str = ""
    fleet: str = ""
    openstack_audience: str | None = None
    keys: str = ""
    key_file: str = ""
    issuer: str = ""
    trust_domain: str = ""
    algorithm: str = "RS256"
    managers: Sequence[int] = ()
    audiences: Mapping[str, Mapping[str, Any]] | None = None

    def execute(self) -> NoReturn:
        words = (sys.executable, "-m", "imdsproxy.issuer.serve", json.dumps(asdict(self)))
        os.execv(sys.executable, words)  # noqa: S606 - our own program, no shell


def main(text: str) -> int:
    """Run the process until it is stopped; return its exit status."""
    plan = Plan(**json.loads(text))
    clock = Clock()
    journal = is_journal(sys.stderr, os.environ)
    open_logging(plan.log_level, plan.log_format, sys.stderr, clock=clock, journal=journal)  # type: ignore[arg-type] # of the settings
    leave_no_dumps()
    try:
        return asyncio.run(_run(plan, clock))
    except ImdsproxyError as error:
        _log.error("the process ends", reason=str(error))
        return error.exit_status


async def _run(plan: Plan, clock: Clock) -> int:
    notifier = ServiceNotifier(os.environ.get("NOTIFY_SOCKET", ""))
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    for path in (Path(plan.pid_file), Path(plan.socket)):
        if not path.parent.is_dir():
            ensure_directory(path.parent)
    pid_file = PidFile(Path(plan.pid_file))
    if plan.keys:
        _give_keys(plan)
        # The signer's account may not enter the directories above.
        os.chdir(plan.keys)
    serving = partial(_serve_signer, _read_given(plan)) if plan.keys else _serve_guests
    listener = open_unix_socket(Path(plan.socket), mode=0o660, owner=(-1, plan.clients))
    if plan.user is not None and plan.group is not None and os.geteuid() == 0:
        # The signer may read the subjects too.
        groups = (plan.clients,) if plan.keys and plan.clients >= 0 else ()
        Account(plan.user, plan.group).assume(groups)
    async with serving(plan, listener, clock):
        pid_file.write((os.getpid(), os.getpid()))
        notifier.ready("serving")
        _log.info("ready", socket=plan.socket)
        while not ended.is_set():
            if not pid_file.is_ours():
                raise HostRefused("the pid file was removed or belongs to another process")
            # The controller counts these pauses: a process that hangs has none.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_EVERY_S):
                    await ended.wait()
        notifier.send(STOPPING="1")
    pid_file.release()
    return 0


def _give_keys(plan: Plan) -> None:
    """Give the signer's directory to its account, with files that an operator has copied there as root."""
    directory = Path(plan.keys)
    ensure_directory(directory, mode=_PRIVATE)
    if plan.user is not None and os.geteuid() == 0:
        give_files(directory, directory.iterdir(), (plan.user, plan.group or -1))


def _read_given(plan: Plan) -> bytes:
    """Read the operator's keys as root, which may be alone to read them; empty without such a file."""
    if not plan.key_file:
        return b""
    from imdsproxy.issuer.key_file import read_key_file

    return read_key_file(Path(plan.key_file), plan.user)


@contextlib.asynccontextmanager
async def _serve_guests(plan: Plan, listener: socket.socket, clock: Clock) -> AsyncIterator[None]:
    from imdsproxy.documents.http import serving
    from imdsproxy.issuer.holder import TokenHolder, TokenSource
    from imdsproxy.issuer.local_signer import LocalSigner, SignerClient
    from imdsproxy.issuer.service import IdentityService

    wall: Callable[[], float] = lambda: clock.now().timestamp()  # noqa: E731 - shorter than a function
    source: TokenSource
    if plan.fleet:
        from imdsproxy.issuer.hub_source import HubSource

        source = HubSource(Path(plan.fleet), wall, random.SystemRandom().random)
    else:
        source = LocalSigner(SignerClient(Path(plan.signer), resends=True))
    uniform = random.SystemRandom().uniform
    holder = TokenHolder(Path(plan.subjects), source, clock.monotonic, uniform, wall)
    async with serving(IdentityService(holder, plan.openstack_audience), listener, grace_s=1.0):
        renewing = asyncio.create_task(holder.run())
        try:
            yield
        finally:
            renewing.cancel()


@contextlib.asynccontextmanager
async def _serve_signer(
    given: bytes, plan: Plan, listener: socket.socket, clock: Clock
) -> AsyncIterator[None]:
    from imdsproxy.issuer.claims import AudienceRules, IssuerRules
    from imdsproxy.issuer.exchange import LONGEST_LINE
    from imdsproxy.issuer.key_file import parse_key_file
    from imdsproxy.issuer.key_store import KeyStore
    from imdsproxy.issuer.sealed_keys import SealedKeys
    from imdsproxy.issuer.signer import Signer

    audiences = {name: AudienceRules(**one) for name, one in (plan.audiences or {}).items()}
    rules = IssuerRules(plan.issuer, plan.trust_domain, audiences)
    algorithm: Any = plan.algorithm
    store: KeyStore | SealedKeys
    if plan.subjects:
        keys = parse_key_file(given, plan.key_file) if plan.key_file else ()
        store = KeyStore(Path(), algorithm, plan.issuer, clock, keys)
    else:
        store = SealedKeys(Path(), algorithm, plan.issuer, clock)
    store.open()
    new_id: Callable[[], str] = lambda: str(uuid.uuid4())  # noqa: E731 - shorter than a function
    signer = Signer(
        store,
        rules,
        clock,
        Path(plan.subjects) if plan.subjects else None,
        frozenset({0, os.geteuid(), *plan.managers}),
        new_id,
    )
    server = await asyncio.start_unix_server(signer.answer, sock=listener, limit=LONGEST_LINE)
    try:
        yield
    finally:
        # Waiting for the end would last: the process that answers guests keeps its connection.
        server.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
