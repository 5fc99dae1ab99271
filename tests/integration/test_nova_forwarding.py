"""What Nova receives of a request, and what a guest gets of Nova's answer: byte for byte."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Iterator
from typing import Final

import pytest

from support.guest import Reply
from support.nova_world import SECRET, NovaGuests, open_nova_alone
from support.recorder import Answer, End, Received, reply

pytestmark = pytest.mark.root

_PASSWORD: Final = "/openstack/2013-04-04/password"
_ALLOWED: Final = (
    "Accept: application/json, */*;q=0.1",
    "Content-Type: application/x-www-form-urlencoded",
    "User-Agent: Cloud-Init/25.1",
    'If-None-Match: "a"',
    "If-Modified-Since: Thu, 01 Jan 1970 00:00:00 GMT",
    "Range: bytes=0-9",
)
_BODIES: Final = {
    "text": "#cloud-config\nhostname: ä\n".encode(),
    "gzip": gzip.compress(b"#!/bin/sh\necho hello\n" * 100, mtime=0),
    "every byte": bytes(range(256)) * 40,
    "a mebibyte": hashlib.shake_256(b"x").digest(1024 * 1024),
}


@pytest.fixture(scope="module")
def shared() -> Iterator[NovaGuests]:
    with open_nova_alone() as one:
        yield one


@pytest.fixture
def world(shared: NovaGuests) -> NovaGuests:
    shared.forget()
    return shared


def _lower(lines: tuple[str, ...]) -> dict[bytes, bytes]:
    pairs = (line.encode().split(b": ", 1) for line in lines)
    return {name.lower(): value for name, value in pairs}


def _headers(request: Received) -> list[tuple[bytes, bytes]]:
    return sorted(request.headers)


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_nova_receives_what_was_asked_who_asks_and_nothing_else(
    world: NovaGuests, method: str
) -> None:
    for network in ("red", "green"):
        world.forget()
        target = "/openstack/latest/a%2Fb//c?d=e%3F&&f"
        refused = ("Cookie: a=b", "Accept-Encoding: gzip", "X-Metadata-Provider: x", "Via: 1.1 x")
        body = b"p\0\xff" if method in ("POST", "PUT", "PATCH") else b""
        answer = world.guests[network].ask(
            target, method=method, headers=(*_ALLOWED, *refused), body=body
        )
        assert answer.status == 200
        seen = world.nova.only()
        assert (seen.method, seen.target) == (method, target.encode())
        assert seen.body == seen.raw_body == body
        assert seen.request_line.endswith(b" HTTP/1.1")
        expected = {
            b"host": world.nova.authority.encode(),
            **world.identity(network),
            **_lower(_ALLOWED),
            **({b"content-length": b"3"} if body else {}),
        }
        assert _headers(seen) == sorted(expected.items())


@pytest.mark.parametrize("name", sorted(_BODIES))
def test_a_body_arrives_byte_for_byte(world: NovaGuests, name: str) -> None:
    body = _BODIES[name]
    assert world.red.ask(_PASSWORD, method="POST", body=body).status == 200
    seen = world.nova.only()
    assert seen.body == seen.raw_body == body
    assert seen.values("content-length") == (str(len(body)).encode(),)


# Answers


def _lines(answer: Reply) -> list[str]:
    return answer.head.decode("latin-1").split("\r\n")


def _sent(world: NovaGuests, answer: Answer, *, method: str = "GET") -> Reply:
    world.forget()
    world.nova.answer(answer)
    return world.red.ask("/latest/user-data", method=method)


@pytest.mark.parametrize("framing", ["length", "chunks", "close"])
@pytest.mark.parametrize("name", sorted(_BODIES))
def test_an_answer_comes_byte_for_byte(world: NovaGuests, name: str, framing: str) -> None:
    body = _BODIES[name]
    headers = ["Content-Type: text/html; charset=UTF-8", "Content-Encoding: gzip"]
    closes = framing == "close"
    then = End.CLOSE if closes else End.KEEP
    answer = reply(
        body, headers=headers, chunked=framing == "chunks", with_length=not closes, then=then
    )
    got = _sent(world, answer)
    assert (got.status, got.body) == (200, body)
    assert got.headers["content-encoding"] == "gzip"
    if framing == "length":
        assert got.headers["content-length"] == str(len(body))


_HEADERS: Final = (
    "Content-Type: application/octet-stream; charset=x",
    "Cache-Control: no-cache",
    "Age: 7",
    "Date: Thu, 01 Jan 1970 00:00:00 GMT",
    'ETag: "a"',
    "Server: Apache/2.4",
    "Set-Cookie: a=b",
    "Set-Cookie: c=d",
    "Vary: Accept-Encoding",
    "X-Compute-Request-Id: req-1",
    "X-Odd: \xe4\xff",
    "X-Empty:",
    "Retry-After: 30",
)  # fmt: skip


@pytest.mark.parametrize("status", [200, 201, 206, 400, 403, 404, 405, 409, 500, 502, 503, 504])
def test_novas_status_headers_and_body_pass(world: NovaGuests, status: int) -> None:
    body = b"<html>\xff\xfe</html>"
    answer = reply(body, status=status, headers=_HEADERS)
    got = _sent(world, answer)
    assert (got.status, got.body) == (status, body)
    first, *lines = _lines(got)
    assert first == answer.data.partition(b"\r\n")[0].decode()
    names = [(line.partition(":")[0].lower(), line.partition(":")[2].strip()) for line in lines]
    expected = [
        (line.partition(":")[0].lower(), line.partition(":")[2].strip()) for line in _HEADERS
    ]
    assert sorted(names) == sorted([*expected, ("content-length", str(len(body)))])
    assert len(world.nova.requests) == 1


@pytest.mark.parametrize("status", [204, 304])
def test_an_answer_without_a_body_ends_with_its_head(world: NovaGuests, status: int) -> None:
    world.nova.answer(reply(status=status, headers=('ETag: "a"',), with_length=False))
    with world.red.connect() as connection:
        got = connection.request("/latest/user-data")
        assert (got.status, got.headers) == (status, {"etag": '"a"'})
        assert connection.request("/openstack").status == 200


def test_an_answer_to_head_has_a_length_and_no_body(world: NovaGuests) -> None:
    world.nova.answer(reply(b"a" * 100, with_body=False))
    with world.red.connect() as connection:
        got = connection.request("/latest/user-data", method="HEAD")
        assert (got.status, got.headers["content-length"]) == (200, "100")
        assert connection.request("/openstack").status == 200
    assert [one.method for one in world.nova.requests] == ["HEAD", "GET"]


def test_novas_word_on_its_connection_is_not_the_guests(world: NovaGuests) -> None:
    world.nova.answer(reply(b"a", then=End.CLOSE))
    with world.red.connect() as connection:
        assert not connection.request("/openstack").closes
        assert connection.request("/openstack").status == 200


def test_an_answer_is_asked_for_each_time(world: NovaGuests) -> None:
    for number in range(3):
        body = b"%d" % number
        got = _sent(world, reply(body, headers=["Cache-Control: max-age=3600"]))
        assert got.body == body


def test_a_wrong_signature_brings_novas_own_refusal(world: NovaGuests) -> None:
    world.nova.secret = "another"
    try:
        got = world.red.ask("/openstack", headers=["Accept: */*"])
    finally:
        world.nova.secret = SECRET
    assert (got.status, len(got.body)) == (403, 154)
    assert b"Invalid proxy request signature." in got.body
    assert len(world.nova.requests) == 1


# Connections


def test_connections_to_nova_are_kept(world: NovaGuests) -> None:
    with world.red.connect() as red, world.green.connect() as green:
        for _ in range(20):
            for connection in (red, green):
                assert connection.request("/openstack").status == 200
    assert len(world.nova.requests) == 40
    # The first request of each guest's connection has one of its own; the others share.
    assert len({one.connection for one in world.nova.requests}) <= 4


def test_a_connection_to_nova_outlives_its_guest_and_serves_another(world: NovaGuests) -> None:
    with world.red.connect() as red:
        for _ in range(3):
            assert red.request("/openstack").status == 200
    with world.green.connect() as green:
        world.nova.answer(reply(b"", then=End.CLOSE))
        for _ in range(3):
            assert green.request("/openstack").status == 200
    used = [one.connection for one in world.nova.requests]
    assert set(used[4:]) <= set(used[:3])
