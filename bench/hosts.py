"""Very many hosts of a fleet in one process, each with its own connection and certificate.

Each host reports its items, checks that it receives exactly the items placed on it, and acknowledges at once.

usage: python -m bench.hosts SPECIFICATION     then `report`, `times REVISION` and `end`, a line each
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import socket
import ssl
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from bench.place import raise_open_files
from imdsproxy.fleet.stream import STREAM_PATH, UPGRADE
from imdsproxy.reconcile.progress import Backoff

__all__ = ["HostsSpec", "host_name", "instance_name", "main", "network_of"]

_HEAD: Final = (
    f"GET {STREAM_PATH} HTTP/1.1\r\nHost: hub\r\nConnection: upgrade\r\nUpgrade: {UPGRADE}\r\n"
)
_BY_HAPROXY: Final = "x-imdsproxy-role: host\r\nx-imdsproxy-serial: 1\r\nx-imdsproxy-name: "
_RECEIVE: Final = 65536
_AT_ONCE: Final = 64
_BACKOFF_S: Final = (0.5, 30.0)
_SYNC_S: Final = 60.0
_FAULTS: Final = 100
_PARTS_OF_AN_ADDRESS: Final = 250


def host_name(number: int) -> str:
    """Return a host's name, also the name in its certificate."""
    return f"host-{number}"


def instance_name(host: int, number: int) -> str:
    """Return the name of an instance placed on a host."""
    return f"i-{host}-{number}"


def network_of(host: int, number: int, networks: int) -> str:
    """Return the network of a host's instance."""
    return f"fleet-{(host * 7 + number) % networks}"


@dataclass(frozen=True, slots=True)
class HostsSpec:
    """Specification of a process of hosts, given as JSON.

    Attributes:
        hubs: `ADDRESS:PORT` of each hub, or the path of a stream socket, on which hosts speak as HAProxy would.
        first: The number of the first host.
        count: Number of hosts.
        instances: Number of instances on each host.
        networks: Number of networks of the fleet.
        certificates: Directory with `ca.crt` and `HOST.pem`; empty for stream sockets.
    """

    hubs: tuple[str, ...]
    first: int
    count: int
    instances: int
    networks: int
    certificates: str = ""

    def to_json(self) -> str:
        """Render for the command line."""
        return json.dumps(asdict(self))


@dataclass(slots=True)
class _Crowd:
    """Shared state of the hosts of this process."""

    spec: HostsSpec
    slots: asyncio.Semaphore
    received: dict[int, list[float]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def fault(self, text: str) -> None:
        """Record a violation."""
        if len(self.faults) < _FAULTS:
            self.faults.append(text)


class _Host(asyncio.Protocol):
    """One host, over all its connections."""

    def __init__(self, crowd: _Crowd, number: int) -> None:
        spec = crowd.spec
        self._crowd, self._number, self._name = crowd, number, host_name(number)
        self._own = frozenset(instance_name(number, one) for one in range(spec.instances))
        networks = {network_of(number, one, spec.networks) for one in range(spec.instances)}
        self._wanted = {f"instance/{one}" for one in self._own} | {
            f"network/{one}" for one in networks
        }
        self._items: dict[str, int] = {}
        self._fleet: str | None = None
        self._revision = self._incarnation = 0
        self._context = self._make_context()
        self._transport: asyncio.Transport | None = None
        self._tls: ssl.SSLObject | None = None
        self._buffer = bytearray()
        self._ready, self._gone = asyncio.Event(), asyncio.Event()
        self.connects = 0
        self.synced_at: float | None = None

    def _make_context(self) -> ssl.SSLContext | None:
        directory = self._crowd.spec.certificates
        if not directory:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.load_verify_locations(f"{directory}/ca.crt")
        context.load_cert_chain(f"{directory}/{self._name}.pem")
        return context

    async def live(self) -> None:
        """Follow one hub after another, with the pauses of a real host."""
        hubs = self._crowd.spec.hubs
        backoff = Backoff(*_BACKOFF_S)
        failed = 0
        for turn in range(self._number, sys.maxsize):
            self._ready.clear()
            self._gone.clear()
            async with self._crowd.slots:
                with contextlib.suppress(OSError, TimeoutError):
                    async with asyncio.timeout(_SYNC_S):
                        await self._connect(hubs[turn % len(hubs)])
                        await self._ready.wait()
            if self.synced_at is not None:
                await self._gone.wait()
                self.synced_at, failed = None, 0
                backoff.succeed()
                await asyncio.sleep(random.random())  # noqa: S311 - no secret
                continue
            if self._transport is not None:
                self._transport.abort()
            failed += 1
            if failed % len(hubs) == 0:
                await asyncio.sleep(backoff.fail() * (0.5 + random.random()))  # noqa: S311 - as above

    async def _connect(self, hub: str) -> None:
        loop = asyncio.get_running_loop()
        self._input, self._output = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._buffer.clear()
        self._tls, self._shaken, self._switched = None, False, False
        self.connects += 1
        if hub.startswith("/"):
            await loop.create_unix_connection(lambda: self, hub)
            return
        address, _, port = hub.rpartition(":")
        sock = socket.socket()
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            high, low = divmod(self._number, _PARTS_OF_AN_ADDRESS)
            sock.bind((f"127.1.{high}.{low + 1}", 0))
            await loop.sock_connect(sock, (address, int(port)))
        except BaseException:
            sock.close()
            raise
        await loop.create_connection(lambda: self, sock=sock)

    # Callbacks of asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - of a stream
        self._transport = transport
        if self._context is None:
            self._begin(f"{_BY_HAPROXY}{self._name}\r\n")
        else:
            self._tls = self._context.wrap_bio(self._input, self._output)
            self._read_tls()

    def connection_lost(self, _: Exception | None) -> None:
        self._transport = None
        self._ready.set()
        self._gone.set()

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        if self._tls is None:
            self._buffer += data
        else:
            self._input.write(data)
            self._read_tls()
        if not self._switched:
            head, found, rest = bytes(self._buffer).partition(b"\r\n\r\n")
            if not found:
                return
            self._switched, self._buffer = True, bytearray(rest)
            if b" 101 " not in head[:20]:
                self._refuse(f"{head[:60]!r}")
                return
        if b"\n" in self._buffer:
            *lines, rest = bytes(self._buffer).split(b"\n")
            self._buffer = bytearray(rest)
            for line in lines:
                self._take(json.loads(line), now)

    def _refuse(self, why: str) -> None:
        if self._transport is not None:
            self._transport.abort()
        if " 503 " not in why:
            self._crowd.fault(f"{self._name}: {why}")

    def _read_tls(self) -> None:
        assert self._tls is not None  # noqa: S101 - of a connection with TLS
        try:
            if not self._shaken:
                self._tls.do_handshake()
                self._shaken = True
                self._begin("")
            while piece := self._tls.read(_RECEIVE):
                self._buffer += piece
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            self._refuse(str(error))
            return
        if self._output.pending and self._transport is not None:
            self._transport.write(self._output.read())

    def _begin(self, headers: str) -> None:
        hello = {
            "format": 1,
            "fleet": self._fleet,
            "incarnation": self._incarnation,
            "revision": self._revision,
            "items": self._items,
        }
        self._send(f"{_HEAD}{headers}\r\n{json.dumps({'hello': hello})}\n".encode())

    def _send(self, data: bytes) -> None:
        if self._tls is not None:
            self._tls.write(data)
            data = self._output.read()
        if self._transport is not None:
            self._transport.write(data)

    # Lines of the hub

    def _take(self, line: dict[str, Any], now: float) -> None:
        match line:
            case {"batch": dict(batch)}:
                self._apply(batch, now)
            case {"ping": _}:
                self._send(b'{"ack":%d}\n' % self._revision)
            case {"bye": "stopping" | "replaced" | "behind"}:
                pass
            case _:
                self._crowd.fault(f"{self._name}: {line!r:.300}")

    def _apply(self, batch: dict[str, Any], now: float) -> None:
        for item, (revision, value) in batch.get("put", {}).items():
            self._check(item, revision, value)
            self._items[item] = revision
            if self.synced_at is not None:
                self._crowd.received.setdefault(revision, []).append(now)
        for item in batch.get("remove", ()):
            self._items.pop(item, None)
        if batch.get("held"):
            self._crowd.fault(f"{self._name}: held {batch['held']!r:.200}")
        if batch.get("more"):
            return
        self._revision = max(self._revision, batch["revision"])
        self._fleet = batch.get("fleet", self._fleet)
        self._incarnation = batch.get("incarnation", self._incarnation)
        has = {item for item in self._items if item.startswith(("instance/", "network/"))}
        if has != self._wanted:
            self._crowd.fault(f"{self._name}: it has {len(has)}, not {len(self._wanted)}")
        if self.synced_at is None:
            self.synced_at = now
            self._ready.set()
        self._send(b'{"ack":%d}\n' % self._revision)

    def _check(self, item: str, revision: int, value: dict[str, Any]) -> None:
        kind, _, rest = item.partition("/")
        known = self._items.get(item, 0)
        if revision < known:
            self._crowd.fault(f"{self._name}: {item} of {revision} after {known}")
        match kind:
            case "instance" | "network":
                good = item in self._wanted and value["record"]["id"] == rest
            case "override" | "keys":
                good = rest in self._own
            case _:
                good = (
                    rest == "fleet" or rest.startswith("project/") or rest == f"host/{self._name}"
                )
        if not good:
            self._crowd.fault(f"{self._name}: got {item}")


async def _run(spec: HostsSpec) -> None:
    crowd = _Crowd(spec, asyncio.Semaphore(_AT_ONCE))
    hosts = [_Host(crowd, number) for number in range(spec.first, spec.first + spec.count)]
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    tasks = [asyncio.create_task(one.live()) for one in hosts]
    while words := (await reader.readline()).split():
        match words:
            case [b"times", revision]:
                answer: object = crowd.received.pop(int(revision), [])
            case _:
                synced = [one.synced_at for one in hosts if one.synced_at is not None]
                answer = {
                    "synced": len(synced),
                    "last": max(synced, default=0.0),
                    "connects": sum(one.connects for one in hosts),
                    "faults": crowd.faults,
                }
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    for task in tasks:
        task.cancel()


def main(argv: Sequence[str]) -> int:
    """Simulate these hosts until standard input ends."""
    raise_open_files()
    asyncio.run(_run(HostsSpec(**json.loads(argv[0]))))
    os._exit(0)  # closing ten thousand connections one by one would take too long


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
