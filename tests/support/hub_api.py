"""A hub's API on a unix socket, over a real etcd, and hosts that acknowledge what they get."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import threading
from collections.abc import Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from imdsproxy.api.client import AdminClient
from imdsproxy.documents.http import serve
from imdsproxy.fleet.layout import HostId, HostState, StoredHost, host_key, render_host
from imdsproxy.fleet.members import admits_host
from imdsproxy.fleet.stream import (
    STREAM_PATH,
    UPGRADE,
    Ack,
    Answer,
    Ask,
    Batch,
    Hello,
    parse_from_hub,
    render_line,
)
from imdsproxy.host.clock import Clock
from imdsproxy.host.servers import open_unix_socket
from imdsproxy.hub.api.app import operators_app
from imdsproxy.hub.api.operations import Operations
from imdsproxy.hub.hosts.in_force import InForce, Peers
from imdsproxy.hub.hosts.sealed import password_item
from imdsproxy.hub.hosts.streams import Streams
from imdsproxy.hub.replica import Replica
from imdsproxy.hub.store.envelope import make_envelope, parse_envelope
from imdsproxy.hub.store.etcd import Etcd
from imdsproxy.hub.store.journal import FILE, Journal
from imdsproxy.hub.store.restores import Restores
from imdsproxy.hub.store.state import FleetState
from imdsproxy.hub.store.writes import Writes
from support.etcd_lab import EtcdLab

ENVELOPE = parse_envelope(make_envelope(), "test")
SERIAL = "7F"
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class HubClient(AdminClient):
    """Asks with the headers that HAProxy sets."""

    role: str = "operator"
    scope: str | None = None
    key: str | None = None
    name: str = ""

    def _ask(self, method: str, target: str, raw: bytes | None, headers: Mapping[str, str]) -> Any:
        name = self.name or f"{self.role}-1"
        said = {"role": self.role, "name": name, "serial": SERIAL}
        said |= {} if self.scope is None else {"scope": self.scope}
        named = {f"x-imdsproxy-{key}": value for key, value in said.items()}
        named |= {} if self.key is None else {"idempotency-key": self.key}
        return AdminClient._ask(self, method, target, raw, {**headers, **named})


@dataclass
class HostOfFleet:
    """A host that applies everything at once.

    Attributes:
        has: Its items.
        answers: What its admin API answers, by path.
        failed: What it says of items.
        level: Of the records that it reads.
    """

    name: str
    socket: Path
    has: dict[str, Any] = field(default_factory=dict)
    answers: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    level: int = 1
    asked: list[str] = field(default_factory=list)

    async def run(self) -> None:
        """Follow the hub, again where it has ended the stream, as after an acceptance."""
        while True:
            await self._follow()

    async def _follow(self) -> None:
        reader, writer = await asyncio.open_unix_connection(str(self.socket), limit=2**26)
        lines = [
            f"GET {STREAM_PATH} HTTP/1.1",
            "connection: upgrade",
            f"upgrade: {UPGRADE}",
            "x-imdsproxy-role: host",
            f"x-imdsproxy-name: {self.name}",
            f"x-imdsproxy-serial: {SERIAL}",
        ]
        writer.write("\r\n".join([*lines, "", ""]).encode())
        try:
            assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
            writer.write(render_line(Hello(level=self.level)))
            while line := await reader.readline():
                match parse_from_hub(line):
                    case Batch() as batch:
                        self.has |= {key: value for key, (_, value) in batch.put.items()}
                        for one in batch.remove:
                            self.has.pop(one, None)
                        if not batch.more:
                            writer.write(render_line(Ack(batch.revision, self.failed)))
                    case Ask(number, path):
                        self.asked.append(path)
                        body = self.answers.get(path.partition("?")[0])
                        status = 404 if body is None else 200
                        writer.write(render_line(Answer(number, status, body)))
                    case _:
                        pass
        finally:
            writer.close()


@dataclass
class Hub:
    """A hub without its HAProxy.

    Attributes:
        directory: Of its sockets.
        etcd: Its client.
    """

    name: str
    directory: Path
    etcd: Etcd
    state: FleetState
    streams: Streams
    operations: Operations
    loop: asyncio.AbstractEventLoop
    _hosts: dict[str, asyncio.Task[None]] = field(default_factory=dict)

    @property
    def client(self) -> HubClient:
        return HubClient(self.directory / "api.sock", waiting=None)

    def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Run it in the hub's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)

    def enrol(self, *hosts: str) -> None:
        """Let the fleet have hosts."""
        value = render_host(StoredHost(HostState.ENROLLED, (SERIAL,)))
        for host in hosts:
            self.run(self.etcd.commit((), {host_key(HostId(host)): value}))

    def connect(self, host: str, *, level: int = 1) -> HostOfFleet:
        """A host that is enrolled connects."""
        one = HostOfFleet(host, self.directory / "stream.sock", level=level)

        async def connect() -> None:
            async with asyncio.timeout(20):
                while not admits(self.state, HostId(host), SERIAL):
                    await asyncio.sleep(0.005)
                self._hosts[host] = asyncio.get_running_loop().create_task(one.run())
                while host not in self.streams.hosts:
                    await asyncio.sleep(0.005)

        self.run(connect())
        return one

    def disconnect(self, host: str) -> None:
        """It goes away."""

        async def leave() -> None:
            self._hosts.pop(host).cancel()
            async with asyncio.timeout(20):
                while host in self.streams.hosts:
                    await asyncio.sleep(0.005)

        self.run(leave())


def admits(state: FleetState, host: HostId, serial: str) -> bool:
    return admits_host(state.host(host), serial)


@contextlib.contextmanager
def open_hub(lab: EtcdLab, name: str = "hub-1") -> Iterator[Hub]:
    """A hub in a thread of its own, in the namespace from which etcd is reached."""
    directory = Path(tempfile.mkdtemp(prefix="imdst-hub-"))
    made: list[Hub] = []
    up, end = threading.Event(), threading.Event()

    async def serve_hub() -> None:
        state = FleetState(open_password=partial(password_item, ENVELOPE))
        etcd, clock = lab.client(), Clock()
        journal = Journal(directory / FILE)
        state.remember(await journal.open())
        restores = Restores(etcd, state, name, journal, clock)
        streams = Streams(
            state,
            clock,
            lambda host, serial: admits(state, host, serial),
            restores.suspect,
            restores.raise_overrides,
        )
        random = Random(7)  # noqa: S311
        replica = Replica(etcd, state, streams, name, "https://hub", clock, random, restores)
        in_force = InForce(streams, Peers(state, name, clock))
        writes = Writes(etcd, state, ENVELOPE, clock, levels=in_force.levels, keep=journal.keep)
        operations = Operations(
            etcd, state, streams, writes, in_force, restores, clock, replica.complete
        )
        hub = Hub(name, directory, etcd, state, streams, operations, asyncio.get_running_loop())
        sockets = [
            open_unix_socket(directory / f"{one}.sock", mode=0o600) for one in ("api", "stream")
        ]
        tasks = [
            asyncio.ensure_future(one)
            for one in (
                replica.run(),
                replica.repair(),
                journal.run(),
                streams.run(sockets[1]),
                serve(operators_app(operations), sockets[0]),
            )
        ]
        await operations.complete.wait()
        made.append(hub)
        up.set()
        await asyncio.to_thread(end.wait)
        for task in [*tasks, *hub._hosts.values()]:
            task.cancel()
        await asyncio.gather(*tasks, *hub._hosts.values(), return_exceptions=True)
        await journal.close()
        await etcd.close()

    def run() -> None:
        with lab.entered():
            asyncio.run(serve_hub())

    thread = threading.Thread(target=run)
    thread.start()
    assert up.wait(30), "the hub has not come up"
    try:
        yield made[0]
    finally:
        end.set()
        thread.join()
        for one in directory.iterdir():
            one.unlink()
        directory.rmdir()
