"""Whatever a guest sends, Nova is told who it is by us, and asked for what it asked for, byte for byte."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Final

import pytest

from support.forgeries import (
    ENCODED_PATHS,
    FORGERIES,
    IDENTITY_HEADERS,
    TOKEN,
    EncodedPath,
    Forgery,
    Seen,
)
from support.guest import Connection, Guest, Lost
from support.lab import until
from support.nova_world import NovaWorld, open_nova_world
from support.recorder import Received

pytestmark = pytest.mark.root

_FRAMING: Final = (b"content-length", b"transfer-encoding")


@pytest.fixture(scope="module")
def world() -> Iterator[NovaWorld]:
    with open_nova_world() as one:
        yield one


def _statuses(guest: Guest, data: bytes, answers: int, method: str = "GET") -> list[int]:
    """What a guest gets for something; fewer than `answers` where the connection ends before."""
    with guest.connect() as connection:
        connection.send(data)
        return list(itertools.islice(_read(connection, method), answers))


def _read(connection: Connection, method: str) -> Iterator[int]:
    with contextlib.suppress(Lost):
        while True:
            status = connection.read(method).status
            # Not an answer yet, but leave to go on.
            if status != 100:
                yield status


def _wrong(world: NovaWorld, request: Received, seen: Seen) -> list[str]:
    """How a request that Nova received differs from what it must receive."""
    expected = {
        b"host": world.nova.authority.encode(),
        **world.identity("red"),
        **dict(seen.headers),
    }
    if seen.body:
        expected[b"content-length"] = str(len(seen.body)).encode()
    found = sorted(request.headers)
    wrong = []
    # A length of nothing says nothing.
    if found not in (
        sorted(expected.items()),
        sorted([*expected.items(), (b"content-length", b"0")]),
    ):
        wrong.append(f"headers {found}")
    if (request.method, request.target) != (seen.method, seen.target):
        wrong.append(f"{request.method} {request.target!r}")
    if request.body != seen.body or request.raw_body != seen.body or request.trailers:
        wrong.append(f"body {request.raw_body!r}")
    return wrong


def _outcome(world: NovaWorld, forgery: Forgery) -> list[str]:
    world.forget()
    statuses = _statuses(world.red, forgery.data, max(1, len(forgery.seen)))
    received = list(world.nova.requests)
    wrong = [f"fragments {world.nova.fragments}"] if world.nova.fragments else []
    if forgery.seen:
        if statuses != [200] * len(forgery.seen):
            wrong.append(f"answers {statuses}")
    elif len(statuses) != 1 or not 400 <= statuses[0] < 500:
        wrong.append(f"no refusal but {statuses}")
    if len(received) != len(forgery.seen):
        wrong.append(f"received {[one.request_line for one in received]}")
    for request, seen in zip(received, forgery.seen, strict=False):
        wrong += _wrong(world, request, seen)
    return wrong


def test_no_forgery_reaches_nova(world: NovaWorld) -> None:
    found = {forgery.name: _outcome(world, forgery) for forgery in FORGERIES}
    assert not {name: wrong for name, wrong in found.items() if wrong}


def test_no_forgery_makes_an_unknown_guest_known(world: NovaWorld) -> None:
    stranger = world.lab.guest("red", 66)
    world.forget()
    lines = [f"{name}: {value}" for name, value in IDENTITY_HEADERS.items()]
    reply = stranger.ask("/openstack", headers=lines)
    assert reply.status in (404, 503)
    assert not world.nova.heads
    # What came behind a body was once taken for a word of HAProxy's by who resolves.
    forged = {"X-Imdsproxy-Network": "red", "X-Imdsproxy-Address": world.red.addresses[0]}
    trailers = "".join(f"{name}: {value}\r\n" for name, value in forged.items()).encode()
    for method in (b"GET", b"POST"):
        reply = stranger.raw(
            method + b" /openstack HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"1\r\na\r\n0\r\n" + trailers + b"\r\n"
        )
        assert reply.status in (404, 503)
    assert not world.nova.heads


def test_both_guests_of_one_address_stay_themselves_on_kept_connections(world: NovaWorld) -> None:
    forged = [f"{name}: {value}" for name, value in IDENTITY_HEADERS.items() if name != TOKEN]
    with world.red.connect() as red, world.green.connect() as green:
        for _ in range(5):
            for network, connection in (("red", red), ("green", green)):
                world.forget()
                assert connection.request("/openstack", headers=forged).status == 200
                found = dict(world.nova.only().headers)
                assert found == {
                    b"host": world.nova.authority.encode(),
                    **world.identity(network),
                }


def test_a_guest_that_waits_to_be_told_to_go_on_is_told_so_or_answered(world: NovaWorld) -> None:
    world.forget()
    head = b"POST /openstack/2013-04-04/password HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n"
    with world.red.connect() as connection:
        connection.send(head + b"Content-Length: 4\r\n\r\n")
        assert connection.read().status == 100
        connection.send(b"abcd")
        assert connection.read().status == 200
    assert world.nova.only().body == b"abcd"


# By way of the resolver: what comes in chunks, as a guest's first request does


def _in_chunks(data: bytes) -> bytes:
    """The same request with a body in no chunks at all."""
    return (
        data.replace(b" HTTP/1.1\r\n", b" HTTP/1.1\r\nTransfer-Encoding: chunked\r\n", 1)
        + b"0\r\n\r\n"
    )


def _resolved(world: NovaWorld, case: Forgery | EncodedPath, method: str = "GET") -> list[int]:
    """What the guest gets; asked again where the resolver has enough to do (it takes 200 a second)."""
    statuses: list[int] = []

    def taken() -> bool:
        world.forget()
        statuses[:] = _statuses(world.red, _in_chunks(case.data), 1, method)
        return statuses != [503]

    until(taken, what="the resolver's having time")
    return statuses


def test_no_forgery_reaches_nova_by_way_of_the_resolver(world: NovaWorld) -> None:
    chosen = [
        one
        for one in FORGERIES
        if one.seen == (Seen(),)
        and (one.name.endswith(" as documented") or one.name.startswith("X-Instance-ID "))
    ]
    assert len(chosen) > len(IDENTITY_HEADERS)
    found: dict[str, object] = {}
    for forgery in chosen:
        statuses = _resolved(world, forgery)
        received = list(world.nova.requests)
        wrong = [f"answers {statuses}"] if statuses != [200] else []
        wrong += [words for one in received for words in _wrong(world, one, forgery.seen[0])]
        if wrong or len(received) != 1:
            found[forgery.name] = (wrong, len(received))
    assert not found


@pytest.mark.parametrize("way", ["HAProxy alone", "the resolver"])
def test_every_target_arrives_as_it_was_sent(world: NovaWorld, way: str) -> None:
    found: dict[str, object] = {}
    for path in ENCODED_PATHS:
        world.forget()
        if way == "the resolver":
            statuses = _resolved(world, path, path.method)
        else:
            statuses = _statuses(world.red, path.data, 1, path.method)
        targets = [one.target for one in world.nova.requests]
        if path.arrives is None:
            right = not world.nova.heads and 400 <= statuses[0] < 500
        else:
            right = targets == [path.arrives] and statuses == [200]
        if not right:
            found[path.name] = (statuses, targets)
    assert not found
