"""Stands in for Nova: keeps each request byte for byte, and answers what a test has written down, faults included.

It speaks HTTP/1.1 on a socket of a namespace, from an event loop in a thread of its own. What it keeps is
what came over the wire: no header is folded, decoded, joined or reordered.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import socket
import ssl
import struct
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, Self

from support.guest import inside

_LIMIT: Final = 4 * 1024 * 1024
_BACKLOG: Final = 512
_REASONS: Final = {
    200: "OK",
    201: "Created",
    204: "No Content",
    206: "Partial Content",
    304: "Not Modified",
    400: "Bad Request",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    409: "Conflict",
    500: "Internal Server Error",
    502: "Bad Gateway",
    503: "Service Unavailable",
    504: "Gateway Timeout",
}


class Stage(Enum):
    """How much of a request is read before the answer begins."""

    HEAD = "head"
    REQUEST = "request"


class End(Enum):
    """What becomes of the connection after an answer."""

    KEEP = "keep"
    CLOSE = "close"
    RESET = "reset"
    HANG = "hang"


@dataclass(frozen=True, slots=True)
class Received:
    """A request as it came.

    Attributes:
        connection: Which connection it came on; the recorder's first is 1.
        head: Request line and header lines, each with its line end, without the empty line.
        raw_body: What followed on the wire, chunk sizes and trailers included.
        body: The payload in it.
        trailers: Lines after the last chunk.
    """

    connection: int
    head: bytes
    raw_body: bytes = b""
    body: bytes = b""
    trailers: tuple[bytes, ...] = ()

    @property
    def request_line(self) -> bytes:
        return self.head.partition(b"\r\n")[0]

    @property
    def method(self) -> str:
        return self.request_line.partition(b" ")[0].decode("latin-1")

    @property
    def target(self) -> bytes:
        return self.request_line.partition(b" ")[2].rpartition(b" ")[0]

    @property
    def lines(self) -> tuple[bytes, ...]:
        """The header lines in their order, without line ends."""
        return tuple(self.head.split(b"\r\n")[1:-1])

    @property
    def headers(self) -> tuple[tuple[bytes, bytes], ...]:
        """Names as they came, and values without the blanks around them."""
        pairs = (line.partition(b":") for line in self.lines)
        return tuple((name, value.strip(b" \t")) for name, _, value in pairs)

    def values(self, name: str) -> tuple[bytes, ...]:
        """All values of a header, whatever the case of its name."""
        wanted = name.lower().encode()
        return tuple(value for found, value in self.headers if found.lower() == wanted)

    @property
    def chunked(self) -> bool:
        return any(b"chunked" in value.lower() for value in self.values("transfer-encoding"))

    @property
    def closes(self) -> bool:
        """Whether the client wants the connection closed after the answer."""
        words = [value.lower() for value in self.values("connection")]
        return b"close" in words or (
            self.request_line.endswith(b"HTTP/1.0") and b"keep-alive" not in words
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """What is sent, and when, and what happens then.

    Attributes:
        data: All bytes; nothing is added.
        at: How much of the request is read first.
        delay_s: Time before the first byte.
        pieces: Into how many parts `data` is cut.
        pause_s: Time before each part but the first.
    """

    data: bytes = b""
    at: Stage = Stage.REQUEST
    delay_s: float = 0.0
    pieces: int = 1
    pause_s: float = 0.0
    then: End = End.KEEP


Script = Callable[[Received], Answer]


def reply(
    body: bytes = b"",
    *,
    status: int = 200,
    headers: Sequence[str] = ("Content-Type: text/plain",),
    chunked: bool = False,
    with_length: bool = True,
    with_body: bool = True,
    delay_s: float = 0.0,
    then: End = End.KEEP,
) -> Answer:
    """A whole answer.

    Args:
        headers: Whole lines.
        chunked: Send the body in two chunks.
        with_length: Say how long it is; without it and without chunks it ends with the connection.
        with_body: Send it; not for an answer to HEAD.
    """
    lines = [f"HTTP/1.1 {status} {_REASONS[status]}", *headers]
    if chunked:
        lines.append("Transfer-Encoding: chunked")
    elif with_length:
        lines.append(f"Content-Length: {len(body)}")
    if then is End.CLOSE:
        lines.append("Connection: close")
    head = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"
    sent = (_chunks(body) if chunked else body) if with_body else b""
    return Answer(head + sent, delay_s=delay_s, then=then)


def half(answer: Answer, *, of: int | None = None, then: End = End.CLOSE) -> Answer:
    """The first half of an answer, or its first `of` bytes, and then an end."""
    return Answer(answer.data[: len(answer.data) // 2 if of is None else of], then=then)


def slow(answer: Answer, *, pieces: int, pause_s: float) -> Answer:
    """An answer that comes in pieces."""
    return Answer(answer.data, pieces=pieces, pause_s=pause_s, then=answer.then)


def reset(*, at: Stage = Stage.REQUEST) -> Answer:
    """No answer, but RST."""
    return Answer(at=at, then=End.RESET)


def close_without_a_byte(*, at: Stage = Stage.REQUEST) -> Answer:
    """No answer, but FIN."""
    return Answer(at=at, then=End.CLOSE)


def hang(*, at: Stage = Stage.REQUEST) -> Answer:
    """Nothing at all, until the client gives up or the recorder ends."""
    return Answer(at=at, then=End.HANG)


def garbage(data: bytes = b"SSH-2.0-OpenSSH_9.9\r\n") -> Answer:
    """Bytes that are no HTTP."""
    return Answer(data, then=End.CLOSE)


def signature_of(secret: str, instance: str) -> str:
    """What Nova expects as `X-Instance-ID-Signature` (nova/api/metadata/handler.py)."""
    return hmac.new(secret.encode(), instance.encode(), "sha256").hexdigest()


_REFUSED: Final = {
    b"text/html; charset=UTF-8": (
        b"<html>\n <head>\n  <title>403 Forbidden</title>\n </head>\n <body>\n  <h1>403 Forbidden</h1>\n"
        b"  Invalid proxy request signature.<br /><br />\n\n\n\n </body>\n</html>"
    ),
    b"application/json": (
        rb'{"message": "Invalid proxy request signature.<br /><br />\n\n\n", '
        b'"code": "403 Forbidden", "title": "Forbidden"}'
    ),
    b"text/plain; charset=UTF-8": b"403 Forbidden\n\nInvalid proxy request signature.\n\n   ",
}


def _refusal(request: Received) -> Answer:
    """Nova 34's own answer to a wrong signature; webob looks at what the client accepts."""
    accept = b",".join(request.values("accept"))
    kind = b"text/plain; charset=UTF-8"
    if b"html" in accept or b"*/*" in accept:
        kind = b"text/html; charset=UTF-8"
    elif b"application/json" in accept:
        kind = b"application/json"
    body = _REFUSED[kind]
    return reply(body, status=403, headers=[f"Content-Type: {kind.decode()}"])


def _echo(request: Received) -> Answer:
    """What is answered when a test has written nothing down: the target."""
    return reply(request.target, with_body=request.method != "HEAD")


@dataclass(slots=True)
class Recorder:
    """One Nova.

    Args:
        namespace: Where it listens; this process's own for `None`.
        address: What it listens at, with a port that is free.
        secret: With which signatures are checked; `None` takes any.
        tls: Its certificate, and what it demands of clients.

    Attributes:
        requests: Whole requests, in the order in which their ends came.
        heads: Every head that came, also of requests whose body never did.
        fragments: What came of heads that were never finished.
        connections: How many were opened since it was told to forget; health checks too.
        default: Answers what no script is left for.
    """

    namespace: str | None = None
    address: str = "127.0.0.1"
    secret: str | None = None
    tls: ssl.SSLContext | None = None
    default: Script = _echo
    requests: list[Received] = field(default_factory=list)
    heads: list[Received] = field(default_factory=list)
    fragments: list[bytes] = field(default_factory=list)
    connections: int = 0
    port: int = 0
    _number: int = 0
    _scripts: deque[Answer] = field(default_factory=deque)
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    _thread: threading.Thread | None = None
    _accepting: asyncio.Task[None] | None = None
    _open: set[asyncio.Task[None]] = field(default_factory=set)
    _transports: list[asyncio.Transport] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._loop.run_forever, name="recorder")
        self._thread.start()
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._loop.call_soon_threadsafe(self._loop.stop)
        if self._thread is not None:
            self._thread.join()
        self._loop.close()

    @property
    def authority(self) -> str:
        """Its address and port, as a URL has them."""
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{host}:{self.port}"

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.authority}"

    # What a test writes down

    def answer(self, *answers: Answer) -> None:
        """Answer the next requests so, one each, whichever connections they come on."""
        self._scripts.extend(answers)

    def always(self, answer: Answer) -> None:
        """Answer every request so from now on."""
        self.default = lambda _: answer

    def forget(self) -> None:
        """Be as at the beginning; connections stay."""
        for kept in (self.requests, self.heads, self.fragments, self._scripts):
            kept.clear()
        self.connections = 0
        self.default = _echo

    def only(self) -> Received:
        """The one request that came."""
        assert len(self.requests) == 1, [one.request_line for one in self.requests]
        return self.requests[0]

    # Life

    def listen(self) -> None:
        """Take connections, at the port of before if there was one."""
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)

    def refuse(self) -> None:
        """Have new connections refused; those that are open go on."""
        asyncio.run_coroutine_threadsafe(self._refuse(), self._loop).result(10)

    def kill(self) -> None:
        """Be gone at once, as a process that is killed: open connections end, whatever they are at."""
        asyncio.run_coroutine_threadsafe(self._kill(), self._loop).result(10)

    async def _listen(self) -> None:
        sock = self._socket()
        self.port = sock.getsockname()[1]
        self._accepting = asyncio.create_task(self._accept(sock))

    def _socket(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self.address else socket.AF_INET
        if self.namespace is None:
            sock = socket.socket(family)
        else:
            sock = inside(self.namespace, lambda: socket.socket(family))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((self.address, self.port))
        sock.listen(_BACKLOG)
        sock.setblocking(False)
        return sock

    async def _accept(self, listener: socket.socket) -> None:
        # Not asyncio's own: cancelled, they forget a connection that they have just taken.
        readable = asyncio.Event()
        with listener, contextlib.ExitStack() as stack:
            self._loop.add_reader(listener, readable.set)
            stack.callback(self._loop.remove_reader, listener)
            while True:
                await readable.wait()
                readable.clear()
                try:
                    sock, _ = listener.accept()
                except BlockingIOError:
                    continue
                sock.setblocking(False)
                self.connections += 1
                self._number += 1
                task = asyncio.create_task(self._serve(self._number, sock))
                self._open.add(task)
                task.add_done_callback(self._open.discard)

    async def _refuse(self) -> None:
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.wait([self._accepting])
            self._accepting = None

    async def _kill(self) -> None:
        await self._refuse()
        # A task that has not begun would not close its socket.
        await asyncio.sleep(0)
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)
        # One that is closed while its client does not read stays until what is written has gone.
        for transport in self._transports:
            transport.abort()
        self._transports.clear()
        await asyncio.sleep(0)

    async def _serve(self, connection: int, sock: socket.socket) -> None:
        reader = asyncio.StreamReader(limit=_LIMIT, loop=self._loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=self._loop)
        # Whoever asks may go at any time, be it within the handshake.
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            transport, _ = await self._loop.connect_accepted_socket(
                lambda: protocol, sock, ssl=self.tls
            )
            self._transports.append(transport)
            writer = asyncio.StreamWriter(transport, protocol, reader, self._loop)
            try:
                await self._converse(connection, reader, writer)
                await writer.drain()
            except BaseException:
                transport.abort()
                raise
            finally:
                transport.close()

    async def _converse(
        self, connection: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        while (head := await self._head(reader)) is not None:
            early = Received(connection, head)
            self.heads.append(early)
            answer = self._scripts.popleft() if self._scripts else None
            if answer is not None and answer.at is Stage.HEAD:
                request = early
            else:
                request = await _whole(early, reader)
                self.requests.append(request)
            answer = answer or self._judge(request)
            await _write(answer, writer)
            if await _end(answer.then, request, reader, writer):
                return

    async def _head(self, reader: asyncio.StreamReader) -> bytes | None:
        try:
            found = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as error:
            if error.partial:
                self.fragments.append(error.partial)
            return None
        return found[:-2]

    def _judge(self, request: Received) -> Answer:
        if self.secret is not None and not self._signed(request):
            return _refusal(request)
        return self.default(request)

    def _signed(self, request: Received) -> bool:
        instances = request.values("x-instance-id")
        if len(instances) != 1 or self.secret is None:
            return False
        expected = signature_of(self.secret, instances[0].decode("latin-1")).encode()
        return request.values("x-instance-id-signature") == (expected,)


async def _whole(early: Received, reader: asyncio.StreamReader) -> Received:
    if early.chunked:
        raw, body, trailers = await _read_chunks(reader)
        return Received(early.connection, early.head, raw, body, trailers)
    lengths = early.values("content-length")
    body = await reader.readexactly(int(lengths[0])) if lengths else b""
    return Received(early.connection, early.head, body, body)


async def _read_chunks(reader: asyncio.StreamReader) -> tuple[bytes, bytes, tuple[bytes, ...]]:
    raw = body = b""
    while True:
        line = await reader.readuntil(b"\r\n")
        raw += line
        size = int(line.partition(b";")[0], 16)
        if not size:
            break
        chunk = await reader.readexactly(size + 2)
        raw += chunk
        body += chunk[:-2]
    trailers: list[bytes] = []
    while True:
        line = await reader.readuntil(b"\r\n")
        raw += line
        if line == b"\r\n":
            return raw, body, tuple(trailers)
        trailers.append(line[:-2])


async def _write(answer: Answer, writer: asyncio.StreamWriter) -> None:
    if answer.delay_s:
        await asyncio.sleep(answer.delay_s)
    size = max(1, -(-len(answer.data) // answer.pieces))
    for start in range(0, len(answer.data), size):
        if start:
            await asyncio.sleep(answer.pause_s)
        writer.write(answer.data[start : start + size])
        await writer.drain()


async def _end(
    then: End, request: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> bool:
    """Do what comes after an answer; whether the connection is at its end."""
    match then:
        case End.KEEP:
            return request.closes
        case End.CLOSE:
            return True
        case End.RESET:
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
            return True
        case End.HANG:
            with contextlib.suppress(OSError):
                while await reader.read(65_536):
                    pass
            return True


def _chunks(body: bytes) -> bytes:
    middle = len(body) // 2
    parts = [part for part in (body[:middle], body[middle:]) if part]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
