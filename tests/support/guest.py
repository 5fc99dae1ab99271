"""Guests: HTTP from inside a network namespace, byte for byte, and load that counts what it loses.

A socket belongs to the namespace in which it was made, whoever uses it afterwards. So a thread enters the
namespace, makes the socket and ends; a request costs no process.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import Final, Self, TypeVar

from imdsproxy.host.namespaces import DEFAULT_DIRECTORY, NamespaceDirectory, NamespaceThread
from imdsproxy.model.addresses import link_local_of
from imdsproxy.model.entities import MacAddress
from support.patience import patience

T = TypeVar("T")

IPV4: Final = "169.254.169.254"
IPV6: Final = "fe80::a9fe:a9fe"
_PORT: Final = 80
_FASTOPEN_NO_COOKIE: Final = 34
"""TCP_FASTOPEN_NO_COOKIE of linux/tcp.h."""
_TIMEOUT_S: Final = 10.0


class Lost(Exception):
    """A request that got no complete answer: refused, cut off, or not in time."""


def inside(namespace: str, work: Callable[[], T], *, directory: Path = DEFAULT_DIRECTORY) -> T:
    """Do something in a namespace, in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_enter, directory, namespace, work).result()


def _enter(directory: Path, namespace: str, work: Callable[[], T]) -> T:
    thread = NamespaceThread(NamespaceDirectory(directory))
    with contextlib.closing(thread), thread.inside(namespace):
        return work()


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer as it came; names of headers in lower case, the last of equal ones counts."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    head: bytes

    @property
    def closes(self) -> bool:
        """Whether the server closes the connection after it."""
        return self.headers.get("connection", "").lower() == "close"

    @property
    def is_to_come_again(self) -> bool:
        """Whether it asks the guest to come again, and says when."""
        return self.status == 503 and int(self.headers["retry-after"]) >= 1

    @property
    def is_limited(self) -> bool:
        """Whether it is what a guest gets beyond its limits."""
        return self.status == 503 and self.headers.get("retry-after") == "1"

    @property
    def text(self) -> str:
        return self.body.decode()


def _request(
    target: str, *, method: str, host: str | None, headers: Sequence[str], body: bytes
) -> bytes:
    lines = [f"{method} {target} HTTP/1.1"]
    if host is not None:
        lines.append(f"Host: {host}")
    lines += headers
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


class Connection:
    """One TCP connection; requests follow one another on it."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self._read = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()

    def request(
        self,
        target: str,
        *,
        method: str = "GET",
        host: str | None = IPV4,
        headers: Sequence[str] = (),
        body: bytes = b"",
    ) -> Reply:
        """Send a request and read its answer; `headers` are whole lines."""
        self.send(_request(target, method=method, host=host, headers=headers, body=body))
        return self.read(method)

    def send(self, data: bytes) -> None:
        try:
            self.socket.sendall(data)
        except OSError as error:
            raise Lost(f"sending: {error}") from error

    def read(self, method: str = "GET") -> Reply:
        """Read one whole answer."""
        head, _, self._read = self._until(b"\r\n\r\n").partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        status = int(lines[0].split()[1])
        pairs = (line.partition(":") for line in lines[1:])
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        if method == "HEAD" or status in (204, 304) or status < 200:
            return Reply(status, headers, b"", head)
        return Reply(status, headers, self._body(headers), head)

    def everything(self) -> bytes:
        """All bytes until the server closes the connection, exactly as they come."""
        while more := self._more():
            self._read += more
        whole, self._read = self._read, b""
        return whole

    def _body(self, headers: Mapping[str, str]) -> bytes:
        if headers.get("transfer-encoding", "").lower() == "chunked":
            return self._chunks()
        if "content-length" in headers:
            return self._exactly(int(headers["content-length"]))
        return self.everything()

    def _chunks(self) -> bytes:
        body = b""
        while True:
            line, _, self._read = self._until(b"\r\n").partition(b"\r\n")
            size = int(line.partition(b";")[0], 16)
            chunk = self._exactly(size + 2)[:-2]
            if not size:
                return body
            body += chunk

    def _until(self, mark: bytes) -> bytes:
        while mark not in self._read:
            more = self._more()
            if not more:
                raise Lost(f"the connection ended after {self._read[:80]!r}")
            self._read += more
        return self._read

    def _exactly(self, length: int) -> bytes:
        parts, got = [self._read], len(self._read)
        while got < length:
            more = self._more()
            if not more:
                raise Lost(f"the connection ended after {got} of {length} bytes")
            parts.append(more)
            got += len(more)
        whole = b"".join(parts)
        self._read = whole[length:]
        return whole[:length]

    def _more(self) -> bytes:
        try:
            return self.socket.recv(262_144)
        except OSError as error:
            raise Lost(f"reading: {error}") from error


def connect_unix(path: Path | str, timeout_s: float = 20.0) -> Connection:
    """Open a connection to a unix socket.

    Raises:
        Lost: Nobody takes it.
    """
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(timeout_s)
    try:
        sock.connect(str(path))
    except OSError as error:
        sock.close()
        raise Lost(f"connecting to {path}: {error}") from error
    return Connection(sock)


@dataclass(frozen=True, slots=True)
class Guest:
    """A machine behind a network: a namespace with `eth0`.

    Attributes:
        network: The id of its network, as the records have it.
        addresses: Its own, the first IPv4 and the first global IPv6 one.
        directory: Where its namespace is; another place than this host's for a guest of a machine.
        port: Where it asks; another than 80 where what leads from there to a proxy is left out.
        source: The address that it asks from unless another is said; without one, the kernel's choice.
    """

    name: str
    namespace: str
    network: str
    mac: str
    addresses: tuple[str, ...]
    device: str = "eth0"
    directory: Path = DEFAULT_DIRECTORY
    port: int = _PORT
    source: str | None = None

    @property
    def link_local(self) -> str:
        return str(link_local_of(MacAddress(self.mac)))

    def connect(
        self,
        *,
        to: str = IPV4,
        source: str | None = None,
        timeout_s: float | None = None,
        first: bytes = b"",
    ) -> Connection:
        """Open a connection, from `source` where it matters.

        Args:
            timeout_s: For each step of what is done with it; by default, as long as this machine may need.
            first: Bytes that the kernel sends as soon as the server accepts, however busy this machine is.

        Raises:
            Lost: Nobody takes it.
        """
        sock, scope = inside(self.namespace, lambda: self._socket(to), directory=self.directory)
        sock.settimeout(_TIMEOUT_S * patience() if timeout_s is None else timeout_s)
        try:
            if source or self.source:
                sock.bind(_target(source or self.source or "", 0, scope))
            if first:
                sock.setsockopt(socket.IPPROTO_TCP, _FASTOPEN_NO_COOKIE, 1)
                sock.sendto(first, socket.MSG_FASTOPEN, _target(to, self.port, scope))
            else:
                sock.connect(_target(to, self.port, scope))
        except OSError as error:
            sock.close()
            raise Lost(f"connecting to {to}: {error}") from error
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return Connection(sock)

    def _socket(self, to: str) -> tuple[socket.socket, int]:
        family = socket.AF_INET6 if ":" in to else socket.AF_INET
        return socket.socket(family, socket.SOCK_STREAM), socket.if_nametoindex(self.device)

    def ask(
        self,
        target: str,
        *,
        to: str = IPV4,
        source: str | None = None,
        timeout_s: float | None = None,
        method: str = "GET",
        host: str | None = IPV4,
        headers: Sequence[str] = (),
        body: bytes = b"",
        at_once: bool = False,
    ) -> Reply:
        """One request on a connection of its own; `at_once`: it comes with the connection (`connect`'s `first`)."""
        sent = _request(target, method=method, host=host, headers=headers, body=body)
        first = sent if at_once else b""
        with self.connect(to=to, source=source, timeout_s=timeout_s, first=first) as connection:
            if not first:
                connection.send(sent)
            return connection.read(method)

    def reads(
        self,
        target: str,
        *,
        to: str = IPV4,
        source: str | None = None,
        timeout_s: float | None = None,
    ) -> str:
        """The body of an answer 200; the status of another one, or why there is none."""
        try:
            reply = self.ask(target, to=to, source=source, timeout_s=timeout_s)
        except Lost as lost:
            return str(lost)
        return reply.text if reply.status == 200 else str(reply.status)

    def is_served(
        self,
        target: str,
        wrong: Callable[[Guest, Reply], str | None],
        *,
        to: str = IPV4,
        timeout_s: float | None = None,
    ) -> bool:
        """Whether it is answered in time, and nothing is wrong with the answer."""
        try:
            return wrong(self, self.ask(target, to=to, timeout_s=timeout_s)) is None
        except Lost:
            return False

    def raw(self, data: bytes, *, method: str = "GET", timeout_s: float | None = None) -> Reply:
        """Exactly these bytes on a connection of their own."""
        with self.connect(timeout_s=timeout_s) as connection:
            connection.send(data)
            return connection.read(method)

    def reaches(self, *, to: str = IPV4, timeout_s: float = 0.5) -> bool:
        """Whether somebody takes a connection."""
        try:
            self.connect(to=to, timeout_s=timeout_s).close()
        except Lost:
            return False
        return True


def _target(address: str, port: int, scope: int) -> tuple[str, int] | tuple[str, int, int, int]:
    found = ip_address(address)
    if isinstance(found, IPv6Address):
        return (address, port, 0, scope if found.is_link_local else 0)
    return (address, port)


@dataclass(slots=True)
class Asker:
    """One who asks, over the same connection as long as it is left open.

    Attributes:
        kept: How many requests went over a connection that had been used before.
    """

    connect: Callable[[], Connection]
    kept: int = 0
    _connection: Connection | None = field(default=None)

    def ask(
        self, target: str, *, method: str = "GET", host: str = IPV4, headers: Sequence[str] = ()
    ) -> Reply:
        """The answer; over a new connection where the one before has been closed.

        Raises:
            Lost: There is none over a new connection either.
        """
        kept = self._connection is not None
        try:
            reply = self.ask_once(target, method=method, host=host, headers=headers)
        except Lost:
            # A server may close an idle connection at any time; a client asks again.
            if not kept:
                raise
            return self.ask_once(target, method=method, host=host, headers=headers)
        self.kept += kept
        return reply

    def ask_once(
        self, target: str, *, method: str = "GET", host: str = IPV4, headers: Sequence[str] = ()
    ) -> Reply:
        """The answer; none where a connection that had been left open is closed meanwhile."""
        self._connection = self._connection or self.connect()
        try:
            reply = self._connection.request(target, method=method, host=host, headers=headers)
        except Lost:
            self.close()
            raise
        if reply.closes:
            self.close()
        return reply

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


@dataclass(slots=True)
class LoadReport:
    """What became of all requests.

    Attributes:
        lost: Every request without an answer or with a wrong one, in words.
        longest_s: From a request to its answer, the longest.
    """

    answered: int = 0
    lost: list[str] = field(default_factory=list)
    longest_s: float = 0.0


class Background:
    """Work in threads until the end of the `with` block, when `_stop` is set.

    Args:
        work: Of each thread.
    """

    def __init__(self, *work: Callable[[], None]) -> None:
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=one) for one in work]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


class Load(Background):
    """Requests with short pauses, until the end of the `with` block.

    Args:
        guests: Who asks; each has `connections` connections.
        target: What for.
        expect: What is wrong with an answer, or `None` if it is right.
        keep_alive: Many requests on a connection, or each on one of its own.
        at_once: Each on one of its own, with which it comes, so that no server ends between the two.
        again: Where a connection that was kept is closed, ask over another one, as HTTP clients do.
        to: The metadata address.
    """

    def __init__(
        self,
        guests: Sequence[Guest],
        target: str,
        expect: Callable[[Guest, Reply], str | None],
        *,
        keep_alive: bool = True,
        at_once: bool = False,
        again: bool = False,
        connections: int = 1,
        pause_s: float = 0.005,
        to: str = IPV4,
    ) -> None:
        self.report = LoadReport()
        self._target = target
        self._expect = expect
        self._keep_alive = keep_alive
        self._at_once = at_once
        self._again = again
        self._to = to
        self._pause_s = pause_s
        self._lock = threading.Lock()
        super().__init__(*(partial(self._run, one) for one in guests for _ in range(connections)))

    def wait_answers(self, number: int, *, within_s: float = 10.0) -> None:
        """Wait until so many more requests were answered."""
        target = self.report.answered + number
        deadline = time.monotonic() + within_s * patience()
        while self.report.answered < target:
            assert time.monotonic() < deadline, f"no {number} answers"
            time.sleep(0.005)

    def _run(self, guest: Guest) -> None:
        with contextlib.closing(Asker(partial(guest.connect, to=self._to))) as asker:
            while not self._stop.is_set():
                self._ask(guest, asker)
                time.sleep(self._pause_s)

    def _ask(self, guest: Guest, asker: Asker) -> None:
        began = time.monotonic()
        try:
            if self._at_once:
                reply = guest.ask(self._target, to=self._to, at_once=True)
            else:
                reply = (asker.ask if self._again else asker.ask_once)(self._target)
            wrong = self._expect(guest, reply)
        except Lost as error:
            wrong = f"{guest.name}: {error}"
        took = time.monotonic() - began
        with self._lock:
            self.report.answered += 1
            self.report.longest_s = max(self.report.longest_s, took)
            if wrong is not None:
                self.report.lost.append(f"after {took:.3f} s: {wrong}")
        if not self._keep_alive:
            asker.close()


def answers(
    askers: Mapping[str, Asker], target: str, *, method: str = "GET"
) -> Mapping[str, Reply]:
    """What each is told of one target."""
    return {name: asker.ask(target, method=method) for name, asker in askers.items()}


def uuid_of(guest: Guest, *, to: str = IPV4, timeout_s: float | None = None) -> str:
    """The instance that a guest is by its `meta_data.json`; else as `Guest.reads`."""
    text = guest.reads("/openstack/latest/meta_data.json", to=to, timeout_s=timeout_s)
    return str(json.loads(text)["uuid"]) if text.startswith("{") else text


def take_token(guest: Guest | Asker, ttl_s: int = 600) -> str:
    """A session token that the guest asks for."""
    lines = (f"X-aws-ec2-metadata-token-ttl-seconds: {ttl_s}",)
    reply = guest.ask("/latest/api/token", method="PUT", headers=lines)
    assert reply.status == 200, reply
    return reply.text


def with_token(token: str) -> tuple[str, ...]:
    """The header that sends it."""
    return (f"X-aws-ec2-metadata-token: {token}",)
