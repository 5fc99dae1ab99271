"""What Nova receives of a request and what a guest gets of its answer, byte for byte, and when Nova is ill.

A HAProxy alone, in front of two Novas.
"""

import contextlib
import gzip
import hashlib
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Final

import pytest

from support.guest import Asker, Guest, Load, Lost, Reply
from support.haproxy_alone import Alone, Document, open_alone
from support.lab import until
from support.nova_world import INSTANCES, RESPONSE_TIMEOUT_S, NovaGuests, open_nova_alone
from support.patience import patience
from support.recorder import CLOSED, GARBAGE, HANGS, RESET, Answer, End, half, reply

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
    """Two Novas, both well and known to be."""
    for nova in shared.novas:
        nova.listen()
    shared.forget()
    _until_both_answer(shared)
    shared.forget()
    return shared


@pytest.fixture(scope="module")
def enduring() -> Iterator[NovaGuests]:
    """The same where Nova has time to come back: HAProxy may wait a second before its last try."""
    with open_nova_alone(response_s=10) as one:
        _until_both_answer(one)
        yield one


def _until_both_answer(world: NovaGuests) -> None:
    def both_answer() -> bool:
        world.red.ask("/openstack")
        return all(nova.requests for nova in world.novas)

    until(both_answer, what="both Novas' being up")


def _ask(guest: Guest, method: str, target: str = _PASSWORD) -> Reply:
    return guest.ask(target, method=method, body=b"cGFzc3dvcmQ=" if method == "POST" else b"")


def _pairs(lines: tuple[str, ...]) -> list[tuple[str, str]]:
    return sorted(
        (name.lower(), value.strip()) for name, _, value in (one.partition(":") for one in lines)
    )


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
        (seen,) = world.requests()
        assert seen.request_line == f"{method} {target} HTTP/1.1".encode()
        assert seen.body == seen.raw_body == body
        allowed = {name.encode(): value.encode() for name, value in _pairs(_ALLOWED)}
        expected = {
            b"host": world.novas[0].authority.encode(),
            **world.identity(network),
            **allowed,
            **({b"content-length": b"3"} if body else {}),
        }
        assert sorted(seen.headers) == sorted(expected.items())


@pytest.mark.parametrize("name", sorted(_BODIES))
def test_bodies_and_answers_come_byte_for_byte(world: NovaGuests, name: str) -> None:
    body = _BODIES[name]
    assert world.red.ask(_PASSWORD, method="POST", body=body).status == 200
    (seen,) = world.requests()
    assert seen.body == seen.raw_body == body
    headers = ["Content-Type: text/html; charset=UTF-8", "Content-Encoding: gzip"]
    for answer in (
        reply(body, headers=headers),
        reply(body, headers=headers, chunked=True),
        reply(body, headers=headers, with_length=False, then=End.CLOSE),
    ):
        world.always(answer)
        got = world.red.ask("/latest/user-data")
        assert (got.status, got.body) == (200, body)
        assert got.headers["content-encoding"] == "gzip"


_HEADERS: Final = (
    "Content-Type: application/octet-stream; charset=x",
    "Cache-Control: max-age=3600",
    "Age: 7",
    "Date: Thu, 01 Jan 1970 00:00:00 GMT",
    'ETag: "a"',
    "Server: Apache/2.4",
    "Set-Cookie: a=b",
    "Set-Cookie: c=d",
    "Vary: Accept-Encoding",
    "X-Odd: \xe4\xff",
    "X-Empty:",
    "Retry-After: 30",
)  # fmt: skip


@pytest.mark.parametrize("status", [200, 201, 206, 400, 403, 404, 405, 409, 500, 502, 503, 504])
def test_novas_status_headers_and_body_pass(world: NovaGuests, status: int) -> None:
    body = b"<html>\xff\xfe</html>"
    answer = reply(body, status=status, headers=_HEADERS)
    world.always(answer)
    # Each time: whatever it says of its age, nothing of Nova's is kept.
    for times in (1, 2):
        got = world.red.ask("/latest/user-data")
        assert (got.status, got.body) == (status, body)
        first, *lines = got.head.decode("latin-1").split("\r\n")
        assert first == answer.data.partition(b"\r\n")[0].decode()
        assert _pairs(tuple(lines)) == _pairs((*_HEADERS, f"Content-Length: {len(body)}"))
        assert len(world.requests()) == times


def test_answers_without_a_body_and_novas_word_on_its_connection_leave_the_guests_open(
    world: NovaGuests,
) -> None:
    etag = ('ETag: "a"',)
    with world.red.connect() as connection:
        for answer, method, status, headers in (
            (reply(status=204, headers=etag, with_length=False), "GET", 204, {"etag": '"a"'}),
            (reply(status=304, headers=etag, with_length=False), "GET", 304, {"etag": '"a"'}),
            (reply(b"a" * 100, headers=(), with_body=False), "HEAD", 200, {"content-length": "100"}),
            (reply(b"a", headers=(), then=End.CLOSE), "GET", 200, {"content-length": "1"}),
        ):  # fmt: skip
            world.always(answer)
            got = connection.request("/latest/user-data", method=method)
            assert (got.status, got.headers) == (status, headers)
            world.forget()
            assert connection.request("/openstack").status == 200


# Connections


@pytest.mark.parametrize("kept", [True, False])
def test_guests_share_connections_to_nova_also_where_they_open_one_for_each_request(
    world: NovaGuests, *, kept: bool
) -> None:
    for guest in (world.red, world.green):
        with contextlib.closing(Asker(guest.connect)) as asker:
            for _ in range(30):
                assert asker.ask_once("/openstack").status == 200
                if not kept:
                    asker.close()
    used: dict[tuple[int, int], set[bytes]] = {}
    for nova in world.novas:
        for one in nova.requests:
            used.setdefault((nova.port, one.connection), set()).update(one.values("x-instance-id"))
    assert len(world.requests()) == 60
    # More than one for each Nova where one was not idle again in time.
    assert len(used) < 15
    assert {name.encode() for name in INSTANCES.values()} in used.values()


def test_what_has_a_body_never_takes_a_connection_that_nova_may_be_closing(
    world: NovaGuests,
) -> None:
    with world.red.connect() as kept:
        for method in ("POST", "GET") * 6:
            assert kept.request("/openstack").status == 200
            assert kept.request(_PASSWORD, method=method, body=b"abc").status == 200
            assert kept.request("/openstack").status == 200
    sent = 0
    for nova in world.novas:
        used = [one.connection for one in nova.requests]
        alone = [one.connection for one in nova.requests if one.body]
        assert all(used.count(connection) == 1 for connection in alone)
        sent += len(alone)
    assert sent == 12


# Nova is down, slow, halfway or beside itself: guests are told to come again, and nothing is done twice


_FAULTS: Final[Mapping[str, Answer]] = {
    "a reset": RESET,
    "a close without a byte": CLOSED,
    "a hang": HANGS,
    "no HTTP": GARBAGE,
    "binary": replace(GARBAGE, data=bytes(range(256))),
    "HTTP/0.9": replace(GARBAGE, data=b"<html>hello</html>\n"),
    "a status of words": replace(GARBAGE, data=b"HTTP/1.1 OK\r\n\r\n"),
    "half a status line": half(reply(b"a"), of=9),
    "half a head": half(reply(b"a"), of=30),
    "two lengths": reply(b"ab", headers=("Content-Length: 1",), then=End.CLOSE),
    "a length of words": replace(GARBAGE, data=b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\nab"),
    "a head that is too long": reply(headers=(f"X: {'a' * 40_000}",), then=End.CLOSE),
    "an answer that is too late": replace(reply(b"late"), delay_s=RESPONSE_TIMEOUT_S * 3),
    **{
        f"half an answer and a {then.value}": half(reply(b"a" * 100_000), then=then)
        for then in (End.CLOSE, End.RESET, End.HANG)
    },
}
_REPEATED: Final = ("a reset", "a close without a byte", "no HTTP")


@pytest.mark.parametrize("name", sorted(_FAULTS))
def test_whatever_nova_does_a_guest_is_told_to_come_again_in_time_and_a_post_is_sent_once(
    world: NovaGuests, name: str
) -> None:
    world.always(_FAULTS[name])
    for method in ("GET", "POST"):
        for nova in world.novas:
            nova.heads.clear()
        start = time.monotonic()
        # Of half an answer, whose head may be the guest's already, it notices that it is not whole.
        with contextlib.suppress(*([Lost] if name.startswith("half an answer") else [])):
            assert _ask(world.red, method).is_to_come_again, method
        assert time.monotonic() - start < (RESPONSE_TIMEOUT_S + 0.7) * patience()
    assert sum(len(nova.heads) for nova in world.novas) == 1
    world.forget()
    with world.red.connect() as connection:
        until(lambda: connection.request("/openstack").status == 200, what="being well again")
        if name in _REPEATED:
            world.always(_FAULTS[name])
            assert connection.request("/openstack").is_to_come_again


def test_without_any_nova_a_guest_is_told_to_come_again(world: NovaGuests) -> None:
    for nova in world.novas:
        nova.kill()
    for _ in range(3):
        for method in ("GET", "POST"):
            start = time.monotonic()
            assert _ask(world.red, method).is_to_come_again
            assert time.monotonic() - start < 3 * patience()


def test_a_slow_answer_is_waited_for(world: NovaGuests) -> None:
    whole = reply(b"a" * 3000)
    for answer in (
        replace(whole, delay_s=RESPONSE_TIMEOUT_S * 0.6),
        replace(whole, pieces=6, pause_s=RESPONSE_TIMEOUT_S * 0.4),
    ):
        world.always(answer)
        assert world.red.ask("/openstack").body == b"a" * 3000
    assert len(world.requests()) == 2


# One of two


@pytest.mark.parametrize("name", _REPEATED)
def test_a_get_that_one_nova_does_not_answer_is_asked_of_the_other(
    world: NovaGuests, name: str
) -> None:
    for ill, well in (world.novas, reversed(world.novas)):
        world.forget()
        ill.always(_FAULTS[name])
        for _ in range(6):
            answer = world.red.ask("/openstack/latest?a")
            assert (answer.status, answer.body) == (200, b"/openstack/latest?a")
        assert len(well.requests) == 6
        assert ill.requests


def test_a_post_goes_to_the_other_nova_when_one_refuses_connections(world: NovaGuests) -> None:
    first, second = world.novas
    first.refuse()
    for number in range(1, 7):
        assert _ask(world.red, "POST").status == 200
        assert len(second.heads) == number
    assert not first.heads


def test_a_get_survives_that_its_nova_dies_while_it_works(world: NovaGuests) -> None:
    first, second = world.novas
    for victim, heir in ((first, second), (second, first)):
        world.forget()
        _until_both_answer(world)
        world.forget()
        victim.always(HANGS)
        heir.always(reply(b"from the heir"))
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(world.red.ask, "/openstack") for _ in range(4)]
            until(lambda victim=victim: victim.requests, what="a request to it")  # type: ignore[misc]
            victim.kill()
            assert {one.result().body for one in asked} == {b"from the heir"}
        victim.listen()


@pytest.mark.parametrize("keep_alive", [True, False])
def test_nobody_loses_a_get_while_novas_die_and_come_back(
    enduring: NovaGuests, *, keep_alive: bool
) -> None:
    def wrong(guest: Guest, answer: Reply) -> str | None:
        return None if answer.status == 200 else f"{guest.name} {answer.status}"

    _until_both_answer(enduring)
    guests = [enduring.red, enduring.green]
    with Load(guests, "/openstack", wrong, connections=2, keep_alive=keep_alive) as load:
        for nova in (*enduring.novas, *enduring.novas):
            load.wait_answers(50)
            nova.kill()
            load.wait_answers(50)
            nova.listen()
            before = len(nova.requests)
            until(lambda nova=nova, before=before: len(nova.requests) > before)  # type: ignore[misc]
    assert not load.report.lost


@pytest.mark.parametrize("keep_alive", [True, False])
def test_each_guest_of_the_only_nova_is_answered_or_told_to_come_again_while_it_dies(
    enduring: NovaGuests, *, keep_alive: bool
) -> None:
    def wrong(guest: Guest, answer: Reply) -> str | None:
        good = answer.status == 200 or answer.is_to_come_again
        return None if good else f"{guest.name} {answer.status}"

    only, other = enduring.novas
    other.kill()
    # Nearly all requests are with Nova when it dies.
    only.always(replace(reply(b"a"), delay_s=0.03))
    guests = [enduring.red, enduring.green]
    with Load(guests, "/openstack", wrong, connections=4, keep_alive=keep_alive) as load:
        for _ in range(3):
            before = len(only.requests)
            until(lambda before=before: len(only.requests) > before + 20)  # type: ignore[misc]
            only.kill()
            load.wait_answers(20)
            only.listen()
    other.listen()
    enduring.forget()
    assert not load.report.lost


# Beside documents of ours: the cache stands elsewhere in front of Nova


_PATH: Final = "/latest/user-data"
_TARGETS: Final = tuple(
    f"{start}{_PATH}{query}"
    for start in ("", "http://169.254.169.254")
    for query in ("", "?", "?x=1")
)


@pytest.fixture(scope="module")
def opened() -> Iterator[Alone]:
    with open_alone(nova=True) as alone:
        yield alone


@pytest.fixture
def alone(opened: Alone) -> Alone:
    """Its guest `red` is of Nova, and `green` has documents of ours."""
    opened.nova = True
    opened.renew()
    opened.documents.document = Document(b"OWN" + b"x" * 4000)
    opened.nova = False
    opened.put("green")
    return opened


def _asked(alone: Alone, header: bytes) -> int:
    return sum(header in head.lower() for head in alone.documents.heads)


def _ask_both(alone: Alone, way: str) -> None:
    for target in _TARGETS:
        for network in ("red", "green"):
            reply = alone.ask(target, network, way)
            assert (reply.status, reply.text.rstrip("x")) == (200, f"i-{network}"), target
            if network == "green":
                assert not {"cache-control", "age"} & set(reply.headers)


@pytest.mark.parametrize("way", ["guests", "agents"])
def test_a_guest_of_novas_and_one_with_documents_read_each_their_own(
    alone: Alone, way: str
) -> None:
    _ask_both(alone, way)
    alone.documents.heads.clear()
    _ask_both(alone, way)
    # Nova is asked each time, and for no other guest; ours came out of the cache.
    assert _asked(alone, b"x-instance-id: i-red") == len(_TARGETS)
    assert _asked(alone, b"x-instance-id: ") == len(_TARGETS)
    assert _asked(alone, b"x-imdsproxy-instance: i-green") == 0


def test_no_request_reads_what_another_instance_left_in_the_cache(alone: Alone) -> None:
    alone.put("red")
    for _ in range(2):
        _ask_both(alone, "guests")
    for record in alone.records.values():
        for target in (f"/{record}{_PATH}", f"http://{record}/{record}{_PATH}"):
            for network in ("red", "green"):
                reply = alone.ask(target, network, kept=False)
                own = reply.text.rstrip("x") == f"i-{network}"
                assert reply.status in (400, 404) or own, target
