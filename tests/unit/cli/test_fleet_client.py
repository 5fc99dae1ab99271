"""How an operator's client goes on by another hub."""

import contextlib
import http.client
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from imdsproxy import errors
from imdsproxy.api import client as admin_client
from imdsproxy.api.client import FleetClient
from imdsproxy.fleet.stream import ALIVE_PATH
from support.patience import patience

_LINES = [b'{"instance": {"id": "a"}}\n', b'{"instance": {"id": "b"}}\n']
_DONE = {"networks": 0, "instances": 2, "applied": True, "pending": []}
_Answer = Callable[[str, str], tuple[int, object] | None]


@contextlib.contextmanager
def _hub(answer: _Answer, bodies: list[bytes]) -> Iterator[str]:
    """A hub without TLS; its URL. Where it answers nothing, the connection ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path == ALIVE_PATH:
                self._send(200, {})
            else:
                self._answer()

        def do_PUT(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            assert self.headers["transfer-encoding"] == "chunked"
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            bodies.append(body)
            self._answer()

        def _answer(self) -> None:
            found = answer(self.command, self.path)
            self.close_connection = True
            if found is not None:
                self._send(*found)

        def _send(self, status: int, shape: object) -> None:
            raw = json.dumps(shape).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def _without_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(host: str, port: int, *, timeout: float, context: object) -> object:
        del context
        return http.client.HTTPConnection(host, port, timeout=timeout)

    monkeypatch.setattr(http.client, "HTTPSConnection", connect)
    monkeypatch.setattr(FleetClient, "_context", lambda _: ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))


def _loses(method: str, path: str) -> tuple[int, object] | None:
    """Begins the import, and is gone when it is asked about."""
    if method == "POST":
        return 200, {"importing": "x", "progress": []}
    return (200, []) if urlsplit(path).path == "/v1/progress" else None


def _restarted(method: str, path: str) -> tuple[int, object] | None:
    """The same, and does not know the import any more."""
    unknown = {"code": "source-unavailable", "message": "this hub does not know import x"}
    return _loses(method, path) or (503, unknown)


def _ended(_method: str, _path: str) -> tuple[int, object]:
    """As HAProxy in front of a hub that has just ended."""
    return 503, {"code": "hub-unavailable", "message": "the hub does not answer"}


def _takes(method: str, _path: str) -> tuple[int, object]:
    return (200, _DONE) if method == "POST" else (200, [])


@pytest.mark.parametrize("first", [_loses, _restarted, _ended, lambda *_: None])
def test_an_import_goes_on_by_the_next_hub_with_the_same_records(first: _Answer) -> None:
    begun, ended = list[bytes](), list[bytes]()
    with _hub(first, begun) as one, _hub(_takes, ended) as other:
        client = FleetClient(Path("none"), urls=(one, other))
        assert client.post_records(_LINES, {}, lambda _: None) == _DONE
    assert ended == [b"".join(_LINES)]
    assert begun in ([], ended)


@pytest.mark.parametrize("first", [_ended, lambda *_: None])
def test_a_request_goes_to_the_next_hub_where_the_first_one_is_away(first: _Answer) -> None:
    with _hub(first, []) as one, _hub(_takes, []) as other:
        assert FleetClient(Path("none"), urls=(one, other)).get("/v1/progress") == []


def _refuses(_method: str, _path: str) -> tuple[int, object]:
    return 503, {"code": "restore-suspected", "message": "etcd seems to be restored"}


def test_a_hub_that_hangs_costs_a_command_two_seconds_and_leaves_no_write_in_doubt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(admin_client, "CONNECT_S", 0.2)
    # The kernel takes connections for a program that is stopped.
    with socket.create_server(("127.0.0.1", 0)) as hung:
        url = f"http://127.0.0.1:{hung.getsockname()[1]}"
        with _hub(_takes, []) as other:
            began = time.monotonic()
            assert FleetClient(Path("none"), urls=(url, other)).get("/v1/progress") == []
            assert time.monotonic() - began < 5 * patience()
        with _hub(_refuses, []) as other, pytest.raises(errors.RestoreSuspected):
            FleetClient(Path("none"), urls=(url, other)).request("PUT", "/v1/policies/fleet")


def test_an_import_that_no_hub_ends_says_what_was_wrong_with_each() -> None:
    with _hub(_loses, []) as one, _hub(_restarted, []) as other:
        client = FleetClient(Path("none"), urls=(one, other))
        with pytest.raises(errors.AdminUnavailable, match=r"does not answer.*does not know import"):
            client.post_records(_LINES, {}, lambda _: None)
