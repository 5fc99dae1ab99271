"""Short documents are kept by HAProxy itself, beside its cache: which, for whom, and how many."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

import pytest

from imdsproxy.core.haproxy.model import Bind, DataplaneSpec, Limits
from imdsproxy.core.model import NetworkId
from support.guest import Connection, Reply
from support.haproxy_alone import paths_below, run_haproxy
from support.lab import until

pytestmark = pytest.mark.root

_TEXT: Final = "text/plain; charset=utf-8"
_LEAF: Final = "/latest/meta-data/instance-id"
_PAST_THE_CACHE: Final = ("Cache-Control: no-cache",)
"""HAProxy's cache does not answer that: what is answered once nobody is behind it, is kept beside it."""


@dataclass(frozen=True, slots=True)
class _Document:
    """Of `body`, OWN becomes the instance's id."""

    body: bytes = b"i-0123"
    status: str = "200 OK"
    content_type: str = _TEXT
    lifetime: bool = True


@dataclass(slots=True)
class _Documents:
    """Stands in for the document server, with the same for each path; `told` are the paths that it was asked for."""

    document: _Document = _Document()
    told: list[str] = field(default_factory=list)

    def answer(self, head: bytes) -> bytes:
        path = head.split(b" ", 2)[1].decode()
        method = head.split(b" ", 1)[0]
        instance = next(
            line for line in head.split(b"\r\n") if line.startswith(b"x-imdsproxy-instance: ")
        )
        self.told.append(path)
        one = self.document
        body = one.body.replace(b"OWN", instance.partition(b": ")[2])
        lifetime = "Cache-Control: max-age=3600\r\n" if one.lifetime else ""
        lines = f"HTTP/1.1 {one.status}\r\nContent-Type: {one.content_type}\r\n{lifetime}Content-Length: {len(body)}"
        return f"{lines}\r\n\r\n".encode() + (b"" if method == b"HEAD" else body)


@contextlib.contextmanager
def _serving(path: Path, documents: _Documents) -> Iterator[None]:
    def talk(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            head = b""
            while more := connection.recv(65_536):
                head += more
                while b"\r\n\r\n" in head:
                    one, _, head = head.partition(b"\r\n\r\n")
                    if one.startswith(b"GET /livez "):
                        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                    else:
                        connection.sendall(documents.answer(one))

    def take(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=talk, args=(listener.accept()[0],), daemon=True).start()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(64)
        taking = threading.Thread(target=take, args=(listener,), daemon=True)
        taking.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            taking.join()


@dataclass(slots=True)
class _Stage:
    """A HAProxy for two networks, whose guests have the same address."""

    documents: _Documents
    directory: Path
    ports: dict[str, int]

    def connect(self, network: str = "red") -> Connection:
        return Connection(socket.create_connection(("127.0.0.1", self.ports[network]), 10))

    def ask(
        self, path: str, network: str = "red", *, method: str = "GET", headers: tuple[str, ...] = ()
    ) -> Reply:
        with self.connect(network) as connection:
            return connection.request(path, method=method, headers=headers)

    def kept(self, path: str) -> bool:
        """Whether the second read is answered, past the cache, without the document server."""
        self.ask(path)
        before = len(self.documents.told)
        self.ask(path, headers=_PAST_THE_CACHE)
        return len(self.documents.told) == before

    def command(self, text: str) -> str:
        with socket.socket(socket.AF_UNIX) as asking:
            asking.connect(str(self.directory / "cli.sock"))
            asking.sendall(text.encode() + b"\n")
            said = b""
            while more := asking.recv(65_536):
                said += more
        return said.decode()

    def record(self, network: str, value: str) -> None:
        self.command(f"set map {self.directory}/base.map {network}/127.0.0.1 {value}")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[_Stage]:
    documents = _Documents()
    ports = {network: _free_port() for network in ("red", "green")}
    paths = paths_below(tmp_path)
    records = {"red": "i-red|0001", "green": "i-green|0001"}
    Path(paths.base_map).write_text(
        "".join(f"{network}/127.0.0.1 {record}\n" for network, record in records.items())
    )
    binds = tuple(
        Bind(NetworkId(name), IPv4Address("127.0.0.1"), port) for name, port in ports.items()
    )
    spec = DataplaneSpec(binds, paths, Limits(cache_mb=1))
    more = f"\nglobal\n  stats socket {tmp_path}/cli.sock mode 600 level admin\n"
    with _serving(tmp_path / "d.sock", documents), run_haproxy(spec, tmp_path, more):
        found = _Stage(documents, tmp_path, ports)
        until(lambda: _answers(found))
        yield found


def _answers(stage: _Stage) -> bool:
    try:
        return stage.ask("/latest/up").status == 200
    except OSError:
        return False


def test_a_short_line_below_latest_is_kept_and_comes_as_it_came_at_first(stage: _Stage) -> None:
    first = stage.ask(_LEAF)
    assert stage.kept(_LEAF)
    again = stage.ask(_LEAF, headers=_PAST_THE_CACHE)
    assert (again.status, again.body) == (first.status, first.body) == (200, b"i-0123")
    assert again.headers == first.headers == {"content-type": _TEXT, "content-length": "6"}
    head = stage.ask(_LEAF, method="HEAD", headers=_PAST_THE_CACHE)
    assert (head.headers, head.body) == (first.headers, b"")
    assert stage.documents.told.count(_LEAF) == 1


@pytest.mark.parametrize(
    "document",
    [
        _Document(lifetime=False),
        _Document(status="404 Not Found"),
        _Document(content_type="application/octet-stream"),
        _Document(body=b""),
        _Document(body=b"two\nlines"),
        _Document(body=b"its end\n"),
        _Document(body="umläut".encode()),
        _Document(body=b"nul\0"),
        _Document(body=b"x" * 257),
    ],
    ids=str,
)
def test_what_haproxy_could_not_give_back_as_it_was_is_not_kept(
    stage: _Stage, document: _Document
) -> None:
    stage.documents.document = document
    assert not stage.kept(_LEAF)


@pytest.mark.parametrize(
    "path",
    [
        "/2009-04-04/meta-data/instance-id",
        "/latest//meta-data",
        "/latest/meta-data/",
        "/latest/%61",
        "/latest/../x",
    ],
)
def test_only_one_spelling_of_a_path_is_kept(stage: _Stage, path: str) -> None:
    assert not stage.kept(path)


def test_other_methods_and_tokens_are_not_answered_by_what_is_kept(stage: _Stage) -> None:
    assert stage.kept(_LEAF)
    told = len(stage.documents.told)
    assert stage.ask(_LEAF, headers=("X-aws-ec2-metadata-token: x",)).status == 401
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        stage.ask(_LEAF, method=method)
    assert len(stage.documents.told) == told + 4
    stage.record("red", "+1trrr--b:::64|i-red|0001")
    assert stage.ask(_LEAF).status == 401
    stage.record("red", "+0tooo---:::64|i-red|0001")
    assert stage.ask(_LEAF).status == 403
    stage.record("red", "+1tooog--:::64|i-red|0001")
    assert stage.ask(_LEAF, headers=("Via: 1.1 x",)).status == 403
    stage.record("red", "!")
    assert stage.ask(_LEAF).status == 503


@pytest.mark.parametrize("word", ["", "+1tooo---::0:64|", "+1-ooo---::0:64|"])
def test_a_kept_connection_gets_what_is_kept_for_whom_it_is_now(stage: _Stage, word: str) -> None:
    stage.documents.document = _Document(b"OWN")
    with stage.connect() as connection:
        for number in range(6):
            name = f"i-{number % 2}"
            stage.record("red", f"{word}{name}|0001")
            for _ in range(3):
                assert connection.request(_LEAF).text == name
    assert stage.documents.told.count(_LEAF) == 2
    stage.documents.document = _Document(b"new")
    stage.record("red", f"{word}i-1|0002")
    assert stage.ask(_LEAF).text == "new"


def test_no_path_reads_what_is_kept_for_somebody_else(stage: _Stage) -> None:
    stage.documents.document = _Document(b"OWN")
    assert stage.ask(_LEAF).text == "i-red"
    for path in (
        _LEAF,
        f"{_LEAF}|i-red|0001",
        f"{_LEAF}|i-red|0001|",
        f"{_LEAF}?|i-red|0001",
        "0",
        "/0",
        "/12",
    ):
        for _ in range(2):
            reply = stage.ask(path, "green")
            assert reply.status == 400 or reply.text == "i-green", path


def test_a_body_on_a_read_is_not_taken_for_the_next_request(stage: _Stage) -> None:
    assert stage.kept(_LEAF)
    told = len(stage.documents.told)
    with stage.connect() as connection:
        smuggled = b"GET /latest/smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
        connection.request(_LEAF, body=smuggled)
        time.sleep(0.05)
        connection.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            assert connection.socket.recv(1) == b""
    assert len(stage.documents.told) == told


def test_what_is_kept_has_bounds_however_much_is_read(stage: _Stage) -> None:
    with stage.connect() as connection:
        for number in range(1500):
            assert connection.request(f"/latest/x{number}").status == 200
    lines = stage.command(f"show map {stage.directory}/short.map").split()[1::3]
    documents = [line for line in lines if line.startswith("/")]
    assert 128 < len(documents) <= 256
    assert len(lines) <= 512
