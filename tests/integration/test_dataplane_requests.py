"""What a guest may send and what becomes of it: identity, methods, odd requests, bytes, cache."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import pytest

from support.daemon import instance, user_data_of
from support.guest import IPV6, Guest, Reply
from support.lab import until
from support.patience import patience
from support.world import World, own

pytestmark = pytest.mark.root

_FRESH: Final = "/openstack/latest/meta_data.json"
"""Never cached: its answer comes from the document server each time."""

_CLIENT_ERRORS: Final = {400, 405, 408, 411, 413, 414, 431}


def _name(reply: Reply) -> str:
    assert reply.status == 200
    return str(json.loads(reply.body)["name"])


def _forgeries(other: str) -> Iterator[Sequence[str]]:
    for name in ("instance", "network", "address", "revision"):
        value = {"instance": other, "network": "green", "address": "10.0.0.6"}.get(name, "x")
        yield (f"X-Imdsproxy-{name}: {value}",)
        yield (f"x-imdsproxy-{name}: {value}", f"X-IMDSPROXY-{name.upper()}: {value}")
        yield (f"X_Imdsproxy_{name.title()}: {value}",)
        yield (f"x-imdsproxy_{name}: {value}",)
        yield (f"Connection: keep-alive, x-imdsproxy-{name}",)
        yield (f"Connection: close, X-Imdsproxy-{name}", f"X-Imdsproxy-{name}: {value}")
    yield (f"X-Instance-ID: {other}", "X-Tenant-ID: p", "X-Instance-ID-Signature: 0")
    yield ("X-Forwarded-For: 10.0.0.6", "Forwarded: for=10.0.0.6", "X-Real-IP: 10.0.0.6")
    yield ("X-Metadata-Provider: x", "X-Neutron-Network-ID: green")
    yield ("Via: 1.1 x", "TE: trailers", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__")


def test_no_header_changes_who_a_guest_is(world: World) -> None:
    forgeries = list(_forgeries("green-5"))
    assert len(forgeries) > 20
    for headers in forgeries:
        assert _name(world.red.ask(_FRESH, headers=headers)) == "red-5", headers
        assert own(world.red, world.red.ask("/latest/user-data", headers=headers)) is None, headers


def test_no_header_makes_an_unknown_guest_known(world: World) -> None:
    stranger = world.lab.guest("red", 66)
    for headers in (
        ("X-Imdsproxy-Instance: red-5", "X-Imdsproxy-Revision: x"),
        ("X-Imdsproxy-Address: 10.0.0.5", "X_Imdsproxy_Address: 10.0.0.5"),
        ("Connection: x-imdsproxy-address, x-imdsproxy-network",),
    ):
        assert stranger.ask("/latest/user-data", headers=headers).status == 404


class _Echo:
    """Stands in for the document server and gives back the request's head as it came."""

    def __init__(self, path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        path.unlink(missing_ok=True)
        self._listener.bind(str(path))
        path.chmod(0o666)
        self._listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(5)
                head = b""
                while b"\r\n\r\n" not in head and (more := connection.recv(65_536)):
                    head += more
                size = len(head)
                connection.sendall(
                    b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % size
                    + head
                )

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def echoing(world: World) -> Iterator[World]:
    """The document server's place is taken by one that echoes; no controller mends that."""
    pids = world.settled()
    world.daemon.kill_controller()
    for pid in (pids.documents, *pids.document_workers):
        os.kill(pid, signal.SIGKILL)
    places = [world.daemon.runtime / "jail" / f"documents-{index}.sock" for index in (0, 1)]
    echoes = [_Echo(place) for place in places]
    until(lambda: world.red.ask(_FRESH).status == 200, what="the echo")
    yield world
    for echo, place in zip(echoes, places, strict=True):
        echo.close()
        place.unlink()


def test_only_known_headers_go_on_and_identity_is_ours(echoing: World) -> None:
    allowed = ("Accept: a/b", "User-Agent: me", "Range: bytes=0-1")
    refused = ("Cookie: c", "X-Instance-ID: green-5", "Authorization: a", "X_Instance_ID: green-5",
               "X-Imdsproxy-Instance: green-5", "X-Imdsproxy-Instance: green-6", "Via: v",
               "If-None-Match: x")  # fmt: skip
    for target in (f"{_FRESH}?a=b", f"http://169.254.169.254{_FRESH}", _FRESH):
        reply = echoing.red.ask(target, headers=(*refused, *allowed))
        lines = reply.text.strip().split("\r\n")
        assert lines[0] == f"GET {_FRESH} HTTP/1.1"
        fields = [line.partition(": ")[::2] for line in lines[1:]]
        names = sorted(name for name, _ in fields)
        assert names == sorted([
            "accept", "host", "range", "user-agent", "x-imdsproxy-address",
            "x-imdsproxy-instance", "x-imdsproxy-network", "x-imdsproxy-revision",
        ])  # fmt: skip
        found = dict(fields)
        assert found["x-imdsproxy-instance"] == "red-5"
        assert found["x-imdsproxy-network"] == "red"
        assert found["x-imdsproxy-address"] == "10.0.0.5"


@pytest.mark.parametrize("method", ["CONNECT", "TRACE", "PROPFIND", "get", "X"])
def test_other_methods_are_refused(world: World, method: str) -> None:
    stranger = world.lab.guest("red", 67)
    target = "10.0.0.1:80" if method == "CONNECT" else "/latest/user-data"
    for guest in (world.red, stranger):
        # HAProxy itself refuses a CONNECT whose Host is another one.
        reply = guest.ask(target, method=method, host="10.0.0.1:80")
        assert (reply.status, reply.headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize("method", ["TRACE", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_allow_names_the_methods_that_are_not_405(world: World, method: str) -> None:
    for path in ("/latest/user-data", "/openstack/latest/password", "/latest/api/token"):
        refused = world.red.ask(path, method=method)
        if refused.status != 405:
            assert (path, method) == ("/latest/api/token", "PUT")
            continue
        for allowed in refused.headers["allow"].split(", "):
            reply = world.red.ask(path, method=allowed)
            # A token request without its lifetime is 400.
            assert reply.status in {200, 400}, (path, allowed)


@pytest.mark.parametrize("method", ["HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_every_allowed_method_gets_an_answer(world: World, method: str) -> None:
    reply = world.red.ask("/latest/user-data", method=method)
    assert reply.status == {"HEAD": 200}.get(method, 405)
    assert not reply.body


def test_the_http2_preface_is_refused(world: World) -> None:
    for data in (
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0",
        b"PRI * HTTP/2.0\r\n\r\n",
    ):
        assert world.red.raw(data).status in _CLIENT_ERRORS


_LATEST: Final = b"GET /latest/user-data HTTP/1.1\r\nHost: x\r\n"

_MALFORMED: Final = {
    "no request line": b"hello\r\n\r\n",
    "HTTP/0.9": b"GET /latest/user-data\r\n\r\n",
    "another protocol": b"GET / RTSP/1.0\r\nHost: x\r\n\r\n",
    "a fragment": b"GET /latest/#x HTTP/1.1\r\nHost: x\r\n\r\n",
    "bytes above ASCII": b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
    "a NUL byte": b"GET /\0 HTTP/1.1\r\nHost: x\r\n\r\n",
    "a blank in the target": b"GET /a b HTTP/1.1\r\nHost: x\r\n\r\n",
    "a blank in a name": _LATEST + b"a b: c\r\n\r\n",
    "no colon": _LATEST + b"abc\r\n\r\n",
    "a NUL in a value": _LATEST + b"a: \0\r\n\r\n",
    "a folded line first": b"GET / HTTP/1.1\r\n folded: x\r\n\r\n",
    "a negative length": _LATEST + b"Content-Length: -1\r\n\r\n",
    "a length of words": _LATEST + b"Content-Length: ten\r\n\r\n",
    "two lengths": _LATEST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "two hosts": _LATEST + b"Host: y\r\n\r\n",
    "a coding nobody knows": _LATEST + b"Transfer-Encoding: x\r\n\r\n",
    "a broken chunk": b"POST /openstack/2013-10-17/password HTTP/1.1\r\nHost: x\r\n"
    b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "a long target": b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "a long header": _LATEST + b"a: " + b"b" * 20_000 + b"\r\n\r\n",
    "many headers": _LATEST + b"".join(b"a%d: b\r\n" % n for n in range(1000)) + b"\r\n",
    "a long method": b"A" * 20_000 + b" / HTTP/1.1\r\nHost: x\r\n\r\n",
    "a password that is too long": b"POST /openstack/2013-10-17/password HTTP/1.1\r\nHost: x\r\n"
    b"Content-Length: 70000\r\n\r\n" + b"p" * 70_000,
}


@pytest.mark.parametrize("name", sorted(_MALFORMED))
def test_a_malformed_request_gets_an_answer(world: World, name: str) -> None:
    assert world.red.raw(_MALFORMED[name]).status in _CLIENT_ERRORS


@pytest.mark.slow
def test_a_request_that_never_ends_gets_an_answer(world: World) -> None:
    assert world.red.raw(b"GET /latest/user", timeout_s=20 * patience()).status in _CLIENT_ERRORS


@pytest.mark.parametrize(
    "data",
    [
        b"GET /latest/user-data HTTP/1.0\r\n\r\n",
        b"GET /latest/user-data HTTP/1.1\r\nHost:\r\n\r\n",
        b"GET http://elsewhere/latest/user-data HTTP/1.1\r\nHost: elsewhere\r\n\r\n",
        b"GET http://elsewhere/latest/user-data HTTP/1.0\r\n\r\n",
        b"GET /latest/user-data? HTTP/1.1\r\nHost: [fe80::a9fe:a9fe]\r\n\r\n",
        b"GET /latest/user-data?a=b&c=%2f HTTP/1.1\r\nHost: metadata.google.internal\r\n\r\n",
        b"\r\nGET /latest/user-data HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
def test_an_unusual_request_reads_the_same(world: World, data: bytes) -> None:
    for _ in range(2):
        assert own(world.red, world.red.raw(data)) is None


def test_requests_may_follow_one_another_without_waiting(world: World) -> None:
    with world.red.connect() as connection:
        connection.send((_LATEST + b"\r\n") * 5)
        for _ in range(5):
            assert own(world.red, connection.read()) is None


def test_no_request_reads_what_another_instance_left_in_the_cache(world: World) -> None:
    records = {
        guest.network: f"{guest.network}-5|"
        + str(world.daemon.explain(guest.network, "10.0.0.5")["revision"])
        for guest in world.everybody
    }
    path = "/latest/user-data"
    hosts = ["169.254.169.254", "anything", *records.values()]
    asked = [
        (f"{start}{target}", host)
        for host in hosts
        for start in ("", f"http://{host}", f"https://{host}")
        for target in (path, f"{path}?", f"{path}?x=1", f"{path}?x=2", f"/{path}")
    ]
    for _ in range(2):
        for target, host in asked:
            for guest in world.everybody:
                reply = guest.ask(target, host=host)
                # Where target and Host differ HAProxy refuses; `|` is no part of a host's name.
                refused = reply.status == 400 and "|" in host
                assert refused or own(guest, reply) is None, (target, host)
            mixed = world.red.ask(f"http://elsewhere{path}", host=host)
            assert mixed.status == 400
    crafted = [f"/{record}{path}" for record in records.values()]
    crafted += [f"http://{record}/{record}{path}" for record in records.values()]
    for target in crafted:
        for guest in world.everybody:
            reply = guest.ask(target)
            assert reply.status in (400, 404) or own(guest, reply) is None, target


def _freeze(world: World) -> None:
    pids = world.pids()
    for pid in (pids.controller, pids.documents, *pids.document_workers):
        os.kill(pid, signal.SIGSTOP)


def test_repeated_reads_never_reach_python(world: World) -> None:
    world.settled()
    targets = (
        "/latest/user-data",
        "/latest/meta-data/",
        "/latest/meta-data/instance-id",
        "/openstack/latest/network_data.json",
        "/openstack/latest/user_data",
        "/nocloud/meta-data",
    )
    first = {(guest, target): guest.ask(target) for guest in world.everybody for target in targets}
    _freeze(world)
    for (guest, target), before in first.items():
        for to in ("169.254.169.254", IPV6):
            after = guest.ask(target, to=to)
            assert (after.status, after.body) == (200, before.body), target
        assert guest.ask(target, method="HEAD").status == 200


def test_meta_data_json_is_never_cached(world: World) -> None:
    seeds = {json.loads(world.red.ask(_FRESH).body)["random_seed"] for _ in range(5)}
    assert len(seeds) == 5


@pytest.mark.parametrize("policy", [{}, {"tokens": "off"}], ids=["no policy", "tokens off"])
@pytest.mark.parametrize("path", ["/latest/user-data", "/latest/meta-data/instance-id"])
def test_a_guest_is_told_nothing_of_our_cache(
    world: World, path: str, policy: dict[str, str]
) -> None:
    world.daemon.put(instances=[{**instance("red-5", "red"), "policy": policy}])
    # Some are chosen to be counted, and go another way.
    for _ in range(100):
        reply = world.red.ask(path)
        assert reply.status == 200
        assert not {"cache-control", "age"} & set(reply.headers)
        assert "imdsproxy" not in reply.head.decode().lower()


def test_an_update_shows_at_once(world: World) -> None:
    for number in range(20):
        text = f"#!/bin/sh\necho {number}\n"
        world.daemon.put(instances=[{**instance("red-5", "red"), "user_data": text}])
        for _ in range(2):
            assert world.red.ask("/latest/user-data").text == text


_PAYLOADS: Final = {
    "nothing": b"",
    "text": "#cloud-config\nhostname: ä\n".encode(),
    "line ends": b"a\r\nb\rc\n\n",
    "gzip": gzip.compress(b"#!/bin/sh\necho hello\n" * 100, mtime=0),
    "every byte": bytes(range(256)) * 40,
    "a mebibyte more than is cached": hashlib.shake_256(b"x").digest(2 * 1024 * 1024),
    "the largest": hashlib.shake_256(b"y").digest(16 * 1024 * 1024),
}


@pytest.mark.parametrize("name", sorted(_PAYLOADS))
def test_user_data_comes_byte_for_byte(world: World, name: str) -> None:
    payload = _PAYLOADS[name]
    file = world.daemon.directory / "payload"
    file.write_bytes(payload)
    record = instance("red-5", "red")
    del record["user_data"]
    _put_by_cli(world, {**record, "user_data_file": str(file)})
    for target in ("/latest/user-data", "/openstack/latest/user_data", "/nocloud/user-data"):
        for to in ("169.254.169.254", IPV6):
            reply = world.red.ask(target, to=to, timeout_s=20 * patience())
            assert reply.status == 200
            assert reply.body == payload
            assert reply.headers["content-length"] == str(len(payload))


def _put_by_cli(world: World, record: dict[str, object]) -> None:
    file = world.daemon.directory / "record.json"
    file.write_text(json.dumps({"instances": [record]}))
    done = world.daemon.command("instance", "set", "--file", str(file))
    assert done.status == 0, done.err


def test_another_guests_large_download_holds_nobody_up(world: World) -> None:
    file = world.daemon.directory / "payload"
    file.write_bytes(_PAYLOADS["the largest"])
    record = instance("green-5", "green")
    del record["user_data"]
    _put_by_cli(world, {**record, "user_data_file": str(file)})
    slow: Guest = world.guests["green"]
    with slow.connect(timeout_s=30) as connection:
        connection.send(_LATEST + b"\r\n")
        for _ in range(20):
            assert own(world.red, world.red.ask("/latest/user-data")) is None
            assert _name(world.red.ask(_FRESH)) == "red-5"
        assert connection.read().body == _PAYLOADS["the largest"]


def test_an_instance_reads_its_own_through_every_dialect(world: World) -> None:
    for guest in world.everybody:
        for target in ("/latest/user-data", "/openstack/latest/user_data", "/nocloud/user-data"):
            assert guest.ask(target).body == user_data_of(f"{guest.network}-5")
