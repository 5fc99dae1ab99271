"""A hub with genuine streams whose etcd is in memory, for what a host makes of its fleet.

In front of it, as HAProxy does, something takes connections (TLS where there is a certificate), and says who the
host is. It has a thread of its own, so that the hub of a daemon goes on while a test waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import tempfile
import threading
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from functools import partial
from hashlib import sha256 as sha256_of
from pathlib import Path
from ssl import SSLContext
from typing import Any, Final, TypeVar, cast

from imdsproxy.api.problems import answer_for
from imdsproxy.errors import EtcdUnavailable, ImdsproxyError
from imdsproxy.fleet import layout
from imdsproxy.fleet.layout import (
    HostId,
    Meta,
    SealedKeys,
    StoredInstance,
    StoredNetwork,
    UserData,
    View,
    render_sealed_keys,
)
from imdsproxy.fleet.members import AUTHORITY_PATH, RENEW_PATH, Identity, Role
from imdsproxy.fleet.stream import BLOB_PATH, STREAM_PATH
from imdsproxy.host.clock import Clock
from imdsproxy.hub.api.callers import Caller
from imdsproxy.hub.api.operations import Operations
from imdsproxy.hub.api.routes_fleet import show_blob
from imdsproxy.hub.hosts.in_force import InForce, Peers
from imdsproxy.hub.hosts.sealed import password_item
from imdsproxy.hub.hosts.streams import Streams
from imdsproxy.hub.pki.enrolment import Certified
from imdsproxy.hub.store.envelope import make_envelope, parse_envelope
from imdsproxy.hub.store.etcd import Etcd
from imdsproxy.hub.store.etcd_messages import KeyValue, Snapshot
from imdsproxy.hub.store.state import Change, FleetState, Item
from imdsproxy.hub.store.writes import Writes
from imdsproxy.model.entities import Instance, InstanceId, Network, NetworkId
from imdsproxy.model.records import render_record
from imdsproxy.model.tokens import TokenKey
from imdsproxy.model.tokens import instance_key as token_key_of
from support.host_front import pass_on
from support.patience import patience
from support.restores import restores_of

_T = TypeVar("_T")

HOST: Final = HostId("h1")
FLEET: Final = "6d0f3f0e-6b5f-4d0c-9f0e-3b9c7f1f2a11"
_CALLER: Final = Caller(Identity(Role.HOST, HOST, "1"))
ENVELOPE: Final = parse_envelope(make_envelope(), "test")
_WAIT_S: Final = 20.0
_TURNS: Final = 10


@dataclass(slots=True)
class FleetStore:
    """What etcd has; hubs that share it are of one fleet.

    Attributes:
        blobs: Sealed chunks of user data, by their keys in etcd.
        away: No member of etcd answers.
        token_keys: The fleet's, the one in force first.
    """

    revision: int = 1
    incarnation: int = 1
    entries: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    away: bool = False
    token_keys: tuple[TokenKey, ...] = ()

    def __post_init__(self) -> None:
        self.entries[layout.META] = self.revision, layout.render_meta(Meta(FLEET))

    def keys_of(self, _: View, instance: InstanceId) -> Item | None:
        """An instance's item of keys."""
        own = [token_key_of(key, instance) for key in self.token_keys]
        if not own:
            return None
        value = {"current": own[0].kid, "keys": {key.kid: key.text for key in own}}
        return self.entries[layout.TOKEN_KEYS][0], value

    def write(self, values: Mapping[str, bytes]) -> list[Change]:
        """Write keys in one transaction."""
        self.revision += 1
        self.entries.update({key: (self.revision, value) for key, value in values.items()})
        return [Change(key, value, self.revision) for key, value in values.items()]

    def instance(self, instance: Instance, *hosts: str) -> tuple[str, bytes]:
        """The key and value of an instance on hosts."""
        data, stored = instance.user_data, None
        if data is not None:
            sha256 = sha256_of(bytes(data)).hexdigest()
            stored = UserData(sha256, len(data))
            for number, begin in enumerate(range(0, max(1, len(data)), layout.CHUNK_BYTES)):
                key = layout.blob_key(sha256, number)
                self.blobs[key] = ENVELOPE.seal(key, bytes(data)[begin:][: layout.CHUNK_BYTES])
        record = dict(render_record(replace(instance, user_data=None)))
        places = tuple(map(HostId, hosts or (HOST,)))
        value = layout.render_instance(StoredInstance(places, record, stored))
        return layout.instance_key(instance.id), value

    async def read(self, key: str, range_end: str) -> Snapshot:
        """As `hub.store.etcd.Etcd.read`, of user data."""
        if self.away:
            raise EtcdUnavailable("etcd does not answer")
        found = sorted(one for one in self.blobs.items() if key <= one[0] < range_end)
        return Snapshot(
            self.revision, [KeyValue(*one, self.revision, self.revision) for one in found]
        )


def network_item(network: Network) -> tuple[str, bytes]:
    """The key and value of a network."""
    value = layout.render_network(StoredNetwork(dict(render_record(network))))
    return layout.network_key(network.id), value


class FleetHub:
    """One hub.

    Args:
        store: What etcd has.
        context: The server's side of TLS; without it hosts connect by `http:`.
        listen: Makes the socket at a port, 0 for any, in whatever namespace.
    """

    def __init__(
        self,
        store: FleetStore | None = None,
        *,
        context: SSLContext | None = None,
        listen: Callable[[int], socket.socket] = lambda port: socket.create_server(
            ("127.0.0.1", port)
        ),
    ) -> None:
        self.store = store or FleetStore()
        opened = partial(password_item, ENVELOPE)
        self.state = FleetState(self.store.keys_of, open_password=opened)
        self.age_s, self.skew_s = 0.0, 0.0
        self.certify: Callable[[str], Certified] = lambda _: Certified("", "")
        self.blob_requests: list[str] = []
        self.refuses = False
        self.gives_blobs = threading.Event()
        self.gives_blobs.set()
        self._context = context
        self._listen, self._listener = listen, listen(0)
        self.port = int(self._listener.getsockname()[1])
        self.url = f"{'https' if context else 'http'}://127.0.0.1:{self.port}"
        self._directory = tempfile.TemporaryDirectory(prefix="imdst-")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fleet-hub")
        self._connections: set[asyncio.StreamWriter] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._server: asyncio.Server | None = None
        self._thread.start()
        self.streams = self._do(self._begin())

    def _do(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_WAIT_S * patience())

    async def _begin(self) -> Streams:
        changes = [Change(key, value, at) for key, (at, value) in self.store.entries.items()]
        self.state.apply(self.store.revision, changes)
        hub = self

        class SkewedClock(Clock):
            def now(self) -> datetime:
                return super().now() + timedelta(seconds=hub.skew_s)

        class AgedStreams(Streams):
            def age_s(self) -> float:
                return hub.age_s

        streams = AgedStreams(self.state, SkewedClock(), lambda _host, _serial: not self.refuses)
        inner = socket.socket(socket.AF_UNIX)
        inner.bind(self._inner)
        inner.listen()
        self._tasks.append(asyncio.ensure_future(streams.run(inner)))
        await self._open()
        return streams

    @property
    def _inner(self) -> str:
        return str(Path(self._directory.name) / "streams")

    async def _open(self) -> None:
        listener = self._listener.dup()
        self._server = await asyncio.start_server(self._serve, sock=listener, ssl=self._context)

    # What tests do

    def put(
        self, networks: Iterable[Network] = (), instances: Iterable[Instance] = (), *hosts: str
    ) -> int:
        """Write records in one transaction; the instances are on `HOST`, or on `hosts`."""
        items = dict(map(network_item, networks))
        items |= dict(self.store.instance(one, *hosts) for one in instances)
        return self.write(items)

    def remove_instance(self, instance: str) -> int:
        """Write that an instance is gone, as hubs do."""
        value = layout.render_instance(StoredInstance((), {}, removed_at=1, left=(HOST,)))
        return self.write({layout.instance_key(InstanceId(instance)): value})

    def remove_network(self, network: str) -> int:
        """The same of a network."""
        value = layout.render_network(StoredNetwork({}, removed_at=1))
        return self.write({layout.network_key(NetworkId(network)): value})

    def write(self, values: Mapping[str, bytes]) -> int:
        """Write keys in one transaction, and send what that changes; the revision."""

        async def apply() -> int:
            changes = self.store.write(values)
            self.streams.deliver(self.state.apply(self.store.revision, changes))
            return self.store.revision

        return self._do(apply())

    def have_token_keys(self, *keys: TokenKey) -> int:
        """Sign tokens by the first of these; the revision."""
        self.store.token_keys = keys
        return self.write({layout.TOKEN_KEYS: render_sealed_keys(SealedKeys(b"not opened"))})

    def wait(self, revision: int, within_s: float = _WAIT_S) -> dict[HostId, str]:
        """Wait until a revision is in force on the host; else why it is not."""
        return self._do(self.streams.wait([HOST], revision, within_s))

    def ask(self, path: str) -> tuple[int, Any]:
        """What the host's admin API answers."""
        answer = self._do(self.streams.ask(HOST, path, _WAIT_S))
        return answer.status, answer.body

    def ping(self) -> None:
        """Ping all hosts at once."""

        async def ping() -> None:
            for turn in range(len(self.streams._turns)):
                self.streams._ping(turn)

        self._do(ping())

    def connected(self) -> bool:
        """Whether the host's stream has begun."""
        return HOST in self.streams.hosts

    def away(self) -> None:
        """Be as a hub that was killed: every connection ends, until it is `back`."""

        async def leave() -> None:
            assert self._server is not None
            self._server.close()
            for writer in tuple(self._connections):
                writer.transport.abort()

        self._do(leave())
        self._listener.close()

    def back(self) -> None:
        """Accept connections again."""
        self._listener = self._listen(self.port)
        self._do(self._open())

    def close(self) -> None:
        """End it."""

        async def end() -> None:
            if self._server is not None:
                self._server.close()
                # A connection that was just accepted is among `_connections` some turns of the loop later.
                for _ in range(_TURNS):
                    await asyncio.sleep(0)
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            for writer in tuple(self._connections):
                writer.transport.abort()
            await asyncio.sleep(0)

        self.gives_blobs.set()
        self._do(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._listener.close()
        self._directory.cleanup()

    # In front of it

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        try:
            with contextlib.suppress(OSError, EOFError):
                head = await reader.readuntil(b"\r\n\r\n")
                _, path, _ = head.partition(b"\r\n")[0].decode().split(" ")
                if path == STREAM_PATH:
                    await pass_on(head, reader, writer, self._inner, host=HOST)
                elif path == RENEW_PATH:
                    length = re.search(rb"(?i)content-length: *(\d+)", head)
                    asked = json.loads(await reader.readexactly(int(length[1]) if length else 0))
                    answer = asdict(self.certify(asked["request"]))
                    _give(writer, "200 OK", json.dumps(answer).encode())
                elif path == AUTHORITY_PATH:
                    _give(writer, "404 Not Found", b"")
                elif path.startswith(BLOB_PATH):
                    await self._give_blob(path.removeprefix(BLOB_PATH), writer)
                await writer.drain()
        finally:
            self._connections.discard(writer)
            writer.close()

    async def _give_blob(self, sha256: str, writer: asyncio.StreamWriter) -> None:
        """Answer as the route of a hub does."""
        self.blob_requests.append(sha256)
        await asyncio.to_thread(self.gives_blobs.wait)
        try:
            answer = await show_blob(sha256, self._operations(), _CALLER)
        except ImdsproxyError as error:
            answer = answer_for(error)
        _give(writer, f"{answer.status_code} x", bytes(answer.body))

    def _operations(self) -> Operations:
        """What `show_blob` uses; nothing else is asked of it."""
        etcd, clock = cast("Etcd", self.store), Clock()
        writes = Writes(etcd, self.state, ENVELOPE, clock)
        in_force = InForce(self.streams, Peers(self.state, "hub", clock))
        restores = restores_of(etcd, self.state, clock)
        return Operations(etcd, self.state, self.streams, writes, in_force, restores, clock)


def _give(writer: asyncio.StreamWriter, status: str, body: bytes) -> None:
    head = f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    writer.write(head.encode() + body)
