"""Stands in for Nova: keeps each request byte for byte, and answers what a test has written down, faults included.

It speaks HTTP/1.1 on a socket of a namespace, with a thread for each connection. What it keeps is what came over the
wire: no header is folded, decoded, joined or reordered.
"""

import contextlib
import hmac
import io
import select
import socket
import ssl
import struct
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from http import HTTPStatus
from pathlib import Path
from typing import Final, Self

from support.guest import inside


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
        delay_s: Time before the first byte.
        pieces: Into how many parts `data` is cut.
        pause_s: Time before each part but the first.
    """

    data: bytes = b""
    then: End = End.KEEP
    delay_s: float = 0.0
    pieces: int = 1
    pause_s: float = 0.0


RESET: Final = Answer(then=End.RESET)
CLOSED: Final = Answer(then=End.CLOSE)
"""No answer, but FIN."""
HANGS: Final = Answer(then=End.HANG)
"""Nothing at all, until the client gives up or the recorder ends."""
GARBAGE: Final = Answer(b"SSH-2.0-OpenSSH_9.9\r\n", then=End.CLOSE)


def reply(
    body: bytes = b"",
    *,
    status: int = 200,
    headers: Sequence[str] = ("Content-Type: text/plain",),
    chunked: bool = False,
    with_length: bool = True,
    with_body: bool = True,
    then: End = End.KEEP,
) -> Answer:
    """A whole answer.

    Args:
        headers: Whole lines.
        chunked: Send the body in two chunks.
        with_length: Say how long it is; without it and without chunks it ends with the connection.
        with_body: Send it; not for an answer to HEAD.
    """
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", *headers]
    if chunked:
        lines.append("Transfer-Encoding: chunked")
    elif with_length:
        lines.append(f"Content-Length: {len(body)}")
    if then is End.CLOSE:
        lines.append("Connection: close")
    head = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"
    if chunked:
        parts = [part for part in (body[: len(body) // 2], body[len(body) // 2 :]) if part]
        body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    sent = body if with_body else b""
    return Answer(head + sent, then=then)


def half(answer: Answer, *, of: int | None = None, then: End = End.CLOSE) -> Answer:
    """The first half of an answer, or its first `of` bytes, and then an end."""
    return Answer(answer.data[: len(answer.data) // 2 if of is None else of], then=then)


def signature_of(secret: str, instance: str) -> str:
    """What Nova expects as `X-Instance-ID-Signature` (nova/api/metadata/handler.py)."""
    return hmac.new(secret.encode(), instance.encode(), "sha256").hexdigest()


def _echo(request: Received) -> Answer:
    """What is answered when a test has written nothing down: the target."""
    return reply(request.target, with_body=request.method != "HEAD")


def say_whose(request: Received) -> Answer:
    """Answer as a Nova that says whose the documents are."""
    return reply(b" ".join(request.values("x-instance-id")))


@dataclass(slots=True)
class Recorder:
    """One Nova.

    Args:
        namespace: Where it listens; this process's own for `None`.
        address: What it listens at, with a port that is free.
        path: A unix socket that it listens at instead, open to all.
        secret: With which signatures are checked; `None` takes any.
        tls: Its certificate, and what it demands of clients.

    Attributes:
        requests: Whole requests, in the order in which their ends came.
        heads: Every head that came, also of requests whose body never did.
        fragments: What came of heads that were never finished.
        connections: How many were opened since `forget`; health checks too.
        default: Answers what no script is left for.
    """

    namespace: str | None = None
    address: str = "127.0.0.1"
    path: Path | None = None
    secret: str | None = None
    tls: ssl.SSLContext | None = None
    default: Callable[[Received], Answer] = _echo
    requests: list[Received] = field(default_factory=list)
    heads: list[Received] = field(default_factory=list)
    fragments: list[bytes] = field(default_factory=list)
    connections: int = 0
    port: int = 0
    _number: int = 0
    _scripts: deque[Answer] = field(default_factory=deque)
    _accepting: tuple[socket.socket, threading.Thread] | None = None
    _open: dict[threading.Thread, socket.socket] = field(default_factory=dict)

    def __enter__(self) -> Self:
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

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
        if self._accepting is None:
            listener = self._bound()
            listener.listen(512)
            thread = threading.Thread(target=self._accept, args=(listener,))
            thread.start()
            self._accepting = (listener, thread)

    def refuse(self) -> None:
        """Have new connections refused; those that are open go on."""
        if self._accepting is not None:
            listener, thread = self._accepting
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            listener.close()
            self._accepting = None

    def kill(self) -> None:
        """Be gone at once, as a process that is killed: open connections end, whatever they are at."""
        self.refuse()
        for thread, sock in list(self._open.items()):
            with contextlib.suppress(OSError):
                # TLS would forget what it is in the middle of.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
            thread.join()

    def _bound(self) -> socket.socket:
        if self.path is not None:
            self.path.unlink(missing_ok=True)
            sock = socket.socket(socket.AF_UNIX)
            sock.bind(str(self.path))
            self.path.chmod(0o666)
            return sock
        family = socket.AF_INET6 if ":" in self.address else socket.AF_INET
        if self.namespace is None:
            sock = socket.socket(family)
        else:
            sock = inside(self.namespace, lambda: socket.socket(family))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((self.address, self.port))
        self.port = sock.getsockname()[1]
        return sock

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listener.accept()
                self.connections += 1
                self._number += 1
                if self.tls is not None:
                    try:
                        sock = self.tls.wrap_socket(
                            sock, server_side=True, do_handshake_on_connect=False
                        )
                    except OSError:
                        continue
                thread = threading.Thread(target=self._serve, args=(self._number, sock))
                self._open[thread] = sock
                thread.start()

    def _serve(self, connection: int, sock: socket.socket) -> None:
        # A client may go at any time, be it within the handshake.
        with sock, contextlib.suppress(OSError, EOFError):
            if isinstance(sock, ssl.SSLSocket):
                sock.do_handshake()
            with sock.makefile("rb") as reader:
                self._converse(connection, sock, reader)
        del self._open[threading.current_thread()]

    def _converse(self, connection: int, sock: socket.socket, reader: io.BufferedReader) -> None:
        while head := self._head(reader):
            early = Received(connection, head)
            self.heads.append(early)
            request = _whole(early, reader)
            self.requests.append(request)
            answer = self._scripts.popleft() if self._scripts else self._judge(request)
            _pause(sock, answer.delay_s)
            size = max(1, -(-len(answer.data) // answer.pieces))
            for start in range(0, len(answer.data), size):
                if start:
                    _pause(sock, answer.pause_s)
                sock.sendall(answer.data[start : start + size])
            if answer.then is End.HANG:
                while reader.read1(65_536):
                    pass
            elif answer.then is End.RESET:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if answer.then is not End.KEEP or request.closes:
                return

    def _head(self, reader: io.BufferedReader) -> bytes:
        """A head without its empty line; nothing where none comes any more."""
        found = b""
        while not found.endswith(b"\r\n\r\n"):
            line = reader.readline()
            if not line:
                self.fragments += [found] if found else []
                return b""
            found += line
        return found[:-2]

    def _judge(self, request: Received) -> Answer:
        if self.secret is not None and not self._is_signed(self.secret, request):
            return reply(b"Invalid proxy request signature.", status=403)
        return self.default(request)

    @staticmethod
    def _is_signed(secret: str, request: Received) -> bool:
        instances = request.values("x-instance-id")
        if len(instances) != 1:
            return False
        expected = signature_of(secret, instances[0].decode("latin-1")).encode()
        return request.values("x-instance-id-signature") == (expected,)


def _pause(sock: socket.socket, seconds: float) -> None:
    """Wait, unless the connection ends meanwhile."""
    if seconds:
        select.select([sock], [], [], seconds)


def _whole(head: Received, reader: io.BufferedReader) -> Received:
    if any(b"chunked" in value.lower() for value in head.values("transfer-encoding")):
        return _chunked(head, reader)
    lengths = head.values("content-length")
    body = _exactly(reader, int(lengths[0])) if lengths else b""
    return Received(head.connection, head.head, body, body)


def _chunked(head: Received, reader: io.BufferedReader) -> Received:
    raw = body = b""
    size = -1
    while size:
        line = _line(reader)
        size = int(line.partition(b";")[0], 16)
        chunk = _exactly(reader, size + 2) if size else b""
        raw += line + chunk
        body += chunk[:-2]
    trailers: list[bytes] = []
    while (line := _line(reader)) != b"\r\n":
        trailers.append(line[:-2])
        raw += line
    return Received(head.connection, head.head, raw + line, body, tuple(trailers))


def _line(reader: io.BufferedReader) -> bytes:
    line = reader.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    return line


def _exactly(reader: io.BufferedReader, length: int) -> bytes:
    data = b""
    while len(data) < length:
        more = reader.read1(min(length - len(data), 1_000_000))
        if not more:
            raise EOFError
        data += more
    return data
