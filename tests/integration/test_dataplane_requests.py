"""What a guest may send and what becomes of it: identity, methods, odd requests, bytes, cache.

What HAProxy's rules alone decide is tried without a daemon. What is malformed is in test_hostile_requests.py and
test_nova_forgeries.py.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import signal
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Final

import pytest

from imdsproxy.core.haproxy.counting import ONE_IN
from support.access_table import META, TOKEN, USER_DATA
from support.daemon import instance
from support.guest import IPV6, Guest, Reply, take_token, with_token
from support.haproxy_alone import Alone, Document, open_alone
from support.patience import patience
from support.world import World, own

pytestmark = pytest.mark.root


def _name(reply: Reply) -> str:
    assert reply.status == 200
    return str(json.loads(reply.body)["name"])


@pytest.fixture(scope="module")
def opened() -> Iterator[Alone]:
    with open_alone(count_reads=ONE_IN) as alone:
        yield alone


@pytest.fixture
def alone(opened: Alone) -> Alone:
    opened.renew()
    opened.documents.document = Document(b"OWN")
    return opened


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
    yield ("Cookie: c", "Authorization: a", "If-None-Match: x", f"X_Instance_ID: {other}")


def test_no_header_changes_who_a_guest_is_and_only_known_ones_go_on(alone: Alone) -> None:
    alone.documents.document = Document(b"OWN", lifetime=False)
    allowed = {"accept": "a/b", "user-agent": "me", "range": "bytes=0-1"}
    lines = [f"{name}: {value}" for name, value in allowed.items()]
    record = alone.records["red"]
    identity = {
        "x-imdsproxy-address": "127.0.0.1",
        "x-imdsproxy-instance": "i-red",
        "x-imdsproxy-network": "red",
        "x-imdsproxy-revision": record.partition("|")[2],
    }
    for forged in _forgeries("i-green"):
        for target in (f"{META}?a=b", f"http://169.254.169.254{META}", META):
            assert alone.ask(target, headers=(*forged, *lines)).text == "i-red", forged
            first, *rest = alone.documents.heads[-1].decode().split("\r\n")
            assert first == f"GET {META} HTTP/1.1"
            fields = [line.partition(": ")[::2] for line in rest]
            assert len(fields) == len(dict(fields))
            assert {**allowed, **identity, "host": record} == dict(fields), forged


@pytest.mark.parametrize("method", ["CONNECT", "TRACE", "PROPFIND", "get", "X"])
def test_other_methods_are_refused(alone: Alone, method: str) -> None:
    target = "10.0.0.1:80" if method == "CONNECT" else USER_DATA
    for _ in range(2):
        # HAProxy itself refuses a CONNECT whose Host is another one.
        reply = alone.ask(target, method=method, host="10.0.0.1:80", kept=False)
        assert (reply.status, reply.headers["allow"]) == (405, "GET, HEAD")
        # Once more by way of the resolver.
        alone.forget()


def test_every_method_gets_an_answer_and_allow_names_those_that_are_not_405(world: World) -> None:
    for method in ("HEAD", "POST", "TRACE", "PUT", "DELETE", "OPTIONS", "PATCH"):
        reply = world.red.ask(USER_DATA, method=method)
        assert (reply.status, reply.body) == (200 if method == "HEAD" else 405, b"")
        for path in (USER_DATA, "/openstack/latest/password", TOKEN):
            refused = world.red.ask(path, method=method)
            for allowed in refused.headers.get("allow", "").split(", "):
                reply = world.red.ask(path, method=allowed or "GET")
                # A token request without its lifetime is 400.
                assert not allowed or reply.status in {200, 400}, (path, allowed)


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
        b"GET /latest/user-data HTTP/1.1\r\nHost: x\r\n\r\n" * 5,
    ],
)
def test_an_unusual_request_reads_the_same_and_so_do_many_at_once(
    alone: Alone, data: bytes
) -> None:
    for _ in range(2):
        with alone.connect() as connection:
            connection.send(data)
            for _ in range(data.count(b"GET ")):
                assert connection.read().text == "i-red"
    assert alone.documents.asked == [USER_DATA]


def test_no_request_reads_what_another_instance_left_in_the_cache(alone: Alone) -> None:
    hosts = ["169.254.169.254", "anything", *alone.records.values()]
    asked = [
        (f"{start}{target}", host)
        for host in hosts
        for start in ("", f"http://{host}", f"https://{host}")
        for target in (USER_DATA, f"{USER_DATA}?", f"{USER_DATA}?x=1", f"/{USER_DATA}")
    ]
    asked += [
        (f"{start}/{record}{USER_DATA}", "169.254.169.254")
        for record in alone.records.values()
        for start in ("", f"http://{record}")
    ]
    for _ in range(2):
        for target, host in asked:
            for network in alone.records:
                reply = alone.ask(target, network, host=host, kept=False)
                # Where target and Host differ HAProxy refuses; `|` is no part of a host's name.
                refused = reply.status == 400 and "|" in f"{host}{target}"
                assert refused or reply.text == f"i-{network}", (target, host)
            assert alone.ask(f"http://elsewhere{USER_DATA}", host=host, kept=False).status == 400


def _freeze(world: World) -> None:
    pids = world.pids()
    for pid in (pids.controller, pids.documents, *pids.document_workers):
        os.kill(pid, signal.SIGSTOP)


def test_repeated_reads_never_reach_python(world: World) -> None:
    world.settled()
    targets = (
        USER_DATA,
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
    seeds = {json.loads(world.red.ask(META).body)["random_seed"] for _ in range(5)}
    assert len(seeds) == 5


@pytest.mark.parametrize("word", ["", "+1-ooo---::0:64|"], ids=["no policy", "tokens off"])
@pytest.mark.parametrize("path", [USER_DATA, "/latest/meta-data/instance-id"])
def test_a_guest_is_told_nothing_of_our_cache(alone: Alone, path: str, word: str) -> None:
    alone.write("red", f"{word}{alone.records['red']}")
    # Some are chosen to be counted, and go another way.
    for _ in range(100):
        reply = alone.ask(path)
        assert reply.status == 200
        assert not {"cache-control", "age"} & set(reply.headers)
        assert "imdsproxy" not in reply.head.decode().lower()


_PAYLOADS: Final = {
    "nothing": b"",
    "text": "#cloud-config\nhostname: ä\n".encode(),
    "line ends": b"a\r\nb\rc\n\n",
    "gzip": gzip.compress(b"#!/bin/sh\necho hello\n" * 100, mtime=0),
    "every byte": bytes(range(256)) * 40,
    "a mebibyte more than is cached": hashlib.shake_256(b"x").digest(2 * 1024 * 1024),
    "the largest": hashlib.shake_256(b"y").digest(16 * 1024 * 1024),
}


@pytest.mark.slow
def test_user_data_comes_byte_for_byte(world: World) -> None:
    file = world.daemon.directory / "payload"
    record = instance("red-5", "red")
    del record["user_data"]
    for name, payload in _PAYLOADS.items():
        file.write_bytes(payload)
        _put_by_cli(world, {**record, "user_data_file": str(file)})
        # All trees have the same bytes; large ones take time.
        others = ("/openstack/latest/user_data", "/nocloud/user-data")
        for target in (USER_DATA, *others[: 2 if len(payload) < 2**20 else 0]):
            for to in ("169.254.169.254", IPV6):
                reply = world.red.ask(target, to=to, timeout_s=20 * patience())
                assert (reply.status, reply.body) == (200, payload), (name, target, to)
                assert reply.headers["content-length"] == str(len(payload))


def _put_by_cli(world: World, record: dict[str, object]) -> None:
    file = world.daemon.directory / "record.json"
    file.write_text(json.dumps({"instances": [record]}))
    done = world.daemon.command("instance", "set", "--file", str(file))
    assert done.status == 0, done.err


@pytest.mark.slow
def test_another_guests_large_download_holds_nobody_up(world: World) -> None:
    # More than the kernel keeps of what nothing reads.
    payload = hashlib.shake_256(b"z").digest(8 * 1024 * 1024)
    file = world.daemon.directory / "payload"
    file.write_bytes(payload)
    record = instance("green-5", "green")
    del record["user_data"]
    _put_by_cli(world, {**record, "user_data_file": str(file)})
    slow: Guest = world.guests["green"]
    with slow.connect(timeout_s=30) as connection:
        connection.send(f"GET {USER_DATA} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        for _ in range(20):
            assert own(world.red, world.red.ask("/latest/user-data")) is None
            assert _name(world.red.ask(META)) == "red-5"
        assert connection.read().body == payload


# Conditions of a read (ADR 39): a client that asks whether its copy still holds gets what holds now.


_FUTURE: Final = "If-Modified-Since: Fri, 01 Jan 2100 00:00:00 GMT"
_CONDITIONS: Final = (
    (_FUTURE,),
    ("If-None-Match: *",),
    ('if-none-match: "a", W/"b"',),
    ('If-None-Match: "a"', _FUTURE),
    ("If-Unmodified-Since: Thu, 01 Jan 1970 00:00:00 GMT",),
    ('If-Match: "a"',),
    ('If-Range: "a"', "Range: bytes=0-1"),
)
_PATHS: Final = (
    "/",
    "/latest/meta-data/hostname",
    "/latest/meta-data/",
    "/2009-04-04/meta-data/hostname",
    "/latest/meta-data/hostname?x",
    "/latest/user-data",
    "/openstack",
    "/openstack/2012-08-10/meta_data.json",
    "/openstack/latest/meta_data.json",
    "/openstack/latest/network_data.json",
    "/openstack/latest/password",
    "/nocloud/meta-data",
    "/nocloud/user-data",
)
"""Short ones, cached ones, ones that are never cached; each dialect."""

_VALIDATORS: Final = {"etag", "last-modified", "age", "cache-control", "expires"}


@pytest.mark.parametrize(
    "policy", [None, {"tokens": "required"}, {"tokens": "off"}], ids=["none", "required", "off"]
)
def test_no_condition_of_a_read_changes_its_answer(
    world: World, policy: dict[str, str] | None
) -> None:
    fields = {} if policy is None else {"policy": policy}
    world.daemon.put([], [instance("red-5", "red", fields=fields)])
    token = with_token(take_token(world.red)) if policy == {"tokens": "required"} else ()
    with world.red.connect() as connection:
        for path, method in product(_PATHS, ("GET", "HEAD")):
            plain = connection.request(path, method=method, headers=token)
            assert plain.status == 200, path
            for condition in (*_CONDITIONS, ()) * 2:
                reply = connection.request(path, method=method, headers=(*token, *condition))
                assert _seen(reply, path) == _seen(plain, path), (path, method, condition)
                assert not _VALIDATORS & reply.headers.keys(), (path, method, condition)


def _seen(reply: Reply, path: str) -> tuple[int, str | None, bytes]:
    # `random_seed` is another one in each answer.
    body = b"" if path == "/openstack/latest/meta_data.json" else reply.body
    return reply.status, reply.headers.get("content-length"), body
