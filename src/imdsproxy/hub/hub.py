"""Process of `imdsproxy hub`: it serves hosts and operators, behind HAProxy and from etcd."""

import asyncio
import contextlib
import gc
import os
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, Final

import structlog

from imdsproxy.api.health import HealthServer
from imdsproxy.config.schema import Settings
from imdsproxy.documents.http import serve
from imdsproxy.errors import (
    ImdsproxyError,
    RuntimeUnavailable,
    SourceCorrupt,
    SourceUnavailable,
    first_expected,
    refusing,
)
from imdsproxy.fleet import layout
from imdsproxy.haproxy.launch import locate_program, read_program
from imdsproxy.host.clock import Clock
from imdsproxy.host.logs import open_logging
from imdsproxy.host.notify import Heartbeat, ServiceNotifier, is_journal
from imdsproxy.host.process import freeze_garbage, leave_no_dumps, raise_descriptor_limit
from imdsproxy.host.servers import open_tcp_socket, open_unix_socket
from imdsproxy.hub.accounts import (
    Accounts,
    Places,
    fill_places,
    find_accounts,
    give_places,
    read_certificate,
)
from imdsproxy.hub.api.app import build_api, peers_of
from imdsproxy.hub.api.metrics import HubMetrics
from imdsproxy.hub.front import Front, FrontSpec, find_issuer, fitting_maxconn
from imdsproxy.hub.hosts.sealed import make_first_key
from imdsproxy.hub.parts import Hub, build_hub
from imdsproxy.hub.pki.authority import Authority
from imdsproxy.hub.pki.files import (
    FleetFiles,
    make_renewed_hub,
    write_hub,
)
from imdsproxy.hub.store.journal import Journal
from imdsproxy.hub.store.upkeep import Sweep
from imdsproxy.hub.store.writes import Writes

_FIRST_READ_S: Final = 60.0
_RENEW_EVERY_S: Final = 60.0
"""Interval of the check; short, so that a renewal follows soon after a clock that was ahead is corrected."""

_LOOK_EVERY_S: Final = 1.0
_THREADS: Final = 4

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Prepared:
    """Parts of a hub that root creates: root can read secrets, bind low ports, and assign HAProxy an account."""

    hub: Hub
    places: Places
    accounts: Accounts
    front: Front
    metrics: socket.socket | None
    issuer_certificate: bytes | None


def prepare(settings: Settings, haproxy: str, clock: Clock) -> Prepared:
    """Create the parts that may need root, then take the hub's account.

    Raises:
        ConfigError: A file of the fleet cannot be used.
        DataplaneError: An account does not exist, a directory cannot be created, or HAProxy cannot be run.
        SourceUnavailable: See `open_etcd`.
    """
    accounts = find_accounts(settings.hub)
    places = give_places(settings.hub, accounts)
    hub = build_hub(settings, clock)
    listen = settings.hub.metrics_listen
    metrics = None if listen is None else open_tcp_socket(listen.host, listen.port)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    spec = FrontSpec(
        settings.hub.listen,
        places.certificate,
        places.authority,
        stream_socket=places.stream_socket,
        api_socket=places.api_socket,
        control=places.control,
        maxconn=fitting_maxconn(-1 if limit == resource.RLIM_INFINITY else limit),
        # A TLS handshake takes a millisecond, and thousands of hosts come at once when another hub ends.
        nbthread=min(_THREADS, len(os.sched_getaffinity(0))),
        issuer=find_issuer(settings.identity, places),
    )
    front = Front(locate_program(haproxy), spec, places.config, accounts)
    front.prepare()
    certificate = read_certificate(settings.identity)
    with refusing("take the hub's account"):
        accounts.assume()
    return Prepared(hub, places, accounts, front, metrics, certificate)


async def run_hub(prepared: Prepared, environment: Mapping[str, str], clock: Clock) -> None:
    """Serve until stopped.

    Raises:
        ConfigError: A file of the fleet cannot be used.
        DataplaneError: HAProxy does not start, or has ended.
        SourceUnavailable: etcd did not answer at the start.
    """
    hub, places, front = prepared.hub, prepared.places, prepared.front
    notifier = ServiceNotifier(environment.get("NOTIFY_SOCKET", ""))
    await read_program(front.program)
    owner = prepared.accounts.shared
    fill_places(places, hub.files, prepared.accounts, prepared.issuer_certificate)
    stream_socket = open_unix_socket(places.stream_socket, mode=0o660, owner=owner)
    api_socket = open_unix_socket(places.api_socket, mode=0o660, owner=owner)
    heartbeat = Heartbeat(notifier, environment, clock.monotonic)
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(hub.etcd.close)
        journal = await stack.enter_async_context(_remembering(hub))
        health = None
        if prepared.metrics is not None:
            server = HealthServer(prepared.metrics, alive=heartbeat.alive, who="the hub")
            health = stack.enter_context(server)
        group = await stack.enter_async_context(asyncio.TaskGroup())
        replica, keep = hub.replica, hub.keep
        tasks = [
            # A fleet of an unknown format needs another version of this program.
            group.create_task(keep("etcd", replica.run, final=(SourceCorrupt,)), name="etcd"),
            group.create_task(heartbeat.run(), name="heartbeat"),
        ]
        gc.disable()
        await _first_read(hub, ended)
        # Otherwise hosts would wait half a second for each garbage collection over 300,000 instances.
        freeze_garbage()
        if not ended.is_set():
            writes = Writes(hub.etcd, hub.state, hub.envelope, clock)
            loops: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
                "beat": replica.beat,
                "comparison": replica.compare,
                "watch": replica.prove_watch,
                "sweep": Sweep(hub.etcd, hub.state, clock).run,
                "suspicions": replica.repair,
                "journal": journal.run,
                "first token key": partial(make_first_key, writes),
            }
            if hub.issuer is not None:
                loops["issuer"] = partial(hub.issuer.run, writes)
            tasks += [group.create_task(keep(name, one), name=name) for name, one in loops.items()]
            tasks += [
                group.create_task(hub.streams.run(stream_socket), name="streams"),
                group.create_task(serve(build_api(hub), api_socket), name="api"),
            ]
            await front.start()
            stack.push_async_callback(front.stop)
            tasks += [
                group.create_task(_watch_front(front, ended), name="haproxy"),
                group.create_task(
                    keep("certificate", partial(_renew, hub, front)), name="certificate"
                ),
            ]
            heartbeat.starting = False
            if health is not None:
                metrics = HubMetrics(hub, peers_of(hub), clock.now().timestamp())
                tasks.append(group.create_task(keep("metrics", metrics.run), name="metrics"))
                health.reports = metrics
            hosts = sum(1 for _ in hub.state.keys(layout.HOSTS))
            notifier.ready(f"{hosts} hosts")
            _log.info("ready", name=replica.name, url=hub.url, hosts=hosts)
            readiness = partial(_report_readiness, hub, notifier, f"{hosts} hosts")
            tasks.append(group.create_task(keep("readiness", readiness), name="readiness"))
            await ended.wait()
            notifier.send(STOPPING="1")
        for task in tasks:
            task.cancel()


@contextlib.asynccontextmanager
async def _remembering(hub: Hub) -> AsyncIterator[Journal]:
    """Load the journal's values before etcd is read, and close the journal at the end."""
    journal = hub.replica.restores.journal
    hub.state.remember(await journal.open())
    try:
        yield journal
    finally:
        await journal.close()


async def _first_read(hub: Hub, ended: asyncio.Event) -> None:
    waits = {asyncio.ensure_future(one.wait()) for one in (hub.replica.complete, ended)}
    done: set[asyncio.Future[Any]] = set()
    try:
        while not done:
            done, _ = await asyncio.wait(
                waits, timeout=_FIRST_READ_S, return_when=asyncio.FIRST_COMPLETED
            )
            # Very many keys take longer, so only a failure ends the wait.
            if not done and (failure := hub.replica.failure) is not None:
                raise SourceUnavailable(
                    f"etcd was not read in {_FIRST_READ_S:g} s: {failure.reason}",
                    hint=failure.hint
                    or "hub.etcd.endpoints names its members: `etcdctl endpoint health`",
                )
    finally:
        for one in waits:
            one.cancel()


async def _watch_front(front: Front, ended: asyncio.Event) -> None:
    why = await front.wait()
    if not ended.is_set():
        raise RuntimeUnavailable(
            f"HAProxy in front of the hub has ended: {why}", hint="start the hub again"
        )


async def _report_readiness(hub: Hub, notifier: ServiceNotifier, status: str) -> None:
    before: str | None = None
    while True:
        if (why := hub.unready()) != before:
            before = why
            if why is None:
                _log.info("hosts are served again", name=hub.replica.name)
            else:
                _log.error("no host is served", name=hub.replica.name, reason=why)
            notifier.send(STATUS=status if why is None else f"no host is served: {why}")
        await asyncio.sleep(_LOOK_EVERY_S)


async def renew_certificate(
    files: FleetFiles, authority: Authority, front: Front, now: datetime
) -> bool:
    """Renew a hub's certificate if it is due; return whether it was.

    HAProxy gets the new certificate before the file does. If HAProxy does not take it, the file still has the old one,
    and the next attempt renews it again.
    """
    renewed = await asyncio.to_thread(make_renewed_hub, files, authority, now)
    if renewed is None:
        return False
    await front.replace_certificate(renewed)
    await asyncio.to_thread(write_hub, files, renewed)
    return True


async def _renew(hub: Hub, front: Front) -> None:
    while True:
        try:
            if await renew_certificate(hub.files, hub.authority, front, hub.clock.now()):
                _log.info("certificate renewed", name=hub.replica.name)
        except ImdsproxyError as error:
            _log.error("certificate not renewed", reason=error.message)
        await asyncio.sleep(_RENEW_EVERY_S)


def run(settings: Settings, environment: Mapping[str, str]) -> None:
    """Run a hub until stopped; raise `ImdsproxyError` if the hub cannot start or continue."""
    clock, log = Clock(), settings.log
    journal = is_journal(sys.stderr, environment)
    open_logging(log.level, log.format, sys.stderr, clock=clock, journal=journal)
    raise_descriptor_limit()
    leave_no_dumps()
    try:
        prepared = prepare(settings, settings.haproxy.binary, clock)
        asyncio.run(run_hub(prepared, environment, clock))
    except BaseExceptionGroup as group:
        first = first_expected(group)
        if first is None:
            raise
        raise first from group
