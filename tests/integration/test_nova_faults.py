"""Nova is down, slow, halfway or beside itself: guests are told to come again, and nothing is done twice."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import pytest

from support.guest import Guest, Load, Lost, Reply
from support.lab import until
from support.nova_world import RESPONSE_TIMEOUT_S, NovaGuests, open_nova_alone
from support.patience import patience
from support.recorder import (
    Answer,
    Recorder,
    Stage,
    close_without_a_byte,
    garbage,
    half,
    hang,
    reply,
    reset,
    slow,
)

pytestmark = pytest.mark.root

_PASSWORD: Final = "/openstack/2013-04-04/password"
_BODY: Final = b"cGFzc3dvcmQ="

_FAULTS: Final[Mapping[str, Answer]] = {
    "a reset before it has read": reset(at=Stage.HEAD),
    "a reset after it has read": reset(),
    "a close before it has read": close_without_a_byte(at=Stage.HEAD),
    "a close without a byte": close_without_a_byte(),
    "a hang before it has read": hang(at=Stage.HEAD),
    "a hang": hang(),
    "no HTTP": garbage(),
    "binary": garbage(bytes(range(256))),
    "HTTP/0.9": garbage(b"<html>hello</html>\n"),
    "a status of words": garbage(b"HTTP/1.1 OK\r\n\r\n"),
    "half a status line": half(reply(b"a"), of=9),
    "half a head": half(reply(b"a"), of=30),
    "two lengths": garbage(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab"),
    "a length of words": garbage(b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\nab"),
    "a head that is too long": garbage(b"HTTP/1.1 200 OK\r\nX: " + b"a" * 40_000 + b"\r\n\r\n"),
    "an answer that is too late": reply(b"late", delay_s=RESPONSE_TIMEOUT_S * 3),
}


@pytest.fixture(scope="module")
def shared() -> Iterator[NovaGuests]:
    with open_nova_alone(novas=2) as one:
        yield one


@pytest.fixture
def both(shared: NovaGuests) -> Iterator[NovaGuests]:
    """Two Novas, both well and known to be."""
    shared.forget()
    _until_both_answer(shared)
    shared.forget()
    yield shared
    for nova in shared.novas:
        nova.kill()
        nova.listen()


@pytest.fixture
def one(both: NovaGuests) -> NovaGuests:
    """One Nova left; it is known that the other one is down."""
    _, second = both.novas
    second.kill()
    first = both.novas[0]
    until(lambda: _all_at_the_first(both), what="the second one's being down")
    first.forget()
    return both


def _until_both_answer(world: NovaGuests) -> None:
    def both_answer() -> bool:
        world.red.ask("/openstack")
        return all(nova.requests for nova in world.novas)

    until(both_answer, what="both Novas' being up")


def _all_at_the_first(world: NovaGuests) -> bool:
    return all(world.red.ask("/openstack").status == 200 for _ in range(3))


def _post(guest: Guest) -> Reply:
    return guest.ask(_PASSWORD, method="POST", body=_BODY)


@pytest.mark.parametrize("name", sorted(_FAULTS))
def test_whatever_nova_does_a_guest_is_told_to_come_again_in_time(
    one: NovaGuests, name: str
) -> None:
    first = one.novas[0]
    first.always(_FAULTS[name])
    for method in ("GET", "POST"):
        first.heads.clear()
        start = time.monotonic()
        answer = one.red.ask(_PASSWORD, method=method, body=_BODY if method == "POST" else b"")
        took = time.monotonic() - start
        assert answer.is_to_come_again, (method, answer)
        assert took < (RESPONSE_TIMEOUT_S + 0.7) * patience()
        if method == "POST":
            assert len(first.heads) == 1
    first.forget()
    until(lambda: one.red.ask("/openstack").status == 200, what="being well again")


@pytest.mark.parametrize("name", ["a reset after it has read", "a close without a byte", "no HTTP"])
def test_a_guest_that_keeps_its_connection_is_told_so_at_the_latest_on_a_new_one(
    one: NovaGuests, name: str
) -> None:
    first = one.novas[0]
    with one.red.connect() as connection:
        assert connection.request("/openstack").status == 200
        first.always(_FAULTS[name])
        # HAProxy may close a kept connection instead of an answer, as HTTP allows (RFC 9112, 9.6).
        with contextlib.suppress(Lost):
            assert connection.request("/openstack").is_to_come_again
    assert one.red.ask("/openstack").is_to_come_again
    first.forget()
    until(lambda: one.red.ask("/openstack").status == 200, what="being well again")


def test_without_any_nova_a_guest_is_told_to_come_again(one: NovaGuests) -> None:
    first = one.novas[0]
    first.kill()
    for _ in range(3):
        for method in ("GET", "POST"):
            start = time.monotonic()
            answer = one.red.ask(_PASSWORD, method=method, body=_BODY if method == "POST" else b"")
            assert answer.is_to_come_again
            assert time.monotonic() - start < 3 * patience()
    first.listen()
    until(lambda: one.red.ask("/openstack").status == 200, what="being well again")


def test_a_slow_answer_is_waited_for(one: NovaGuests) -> None:
    first = one.novas[0]
    first.answer(reply(b"late", delay_s=RESPONSE_TIMEOUT_S * 0.6))
    assert one.red.ask("/openstack").body == b"late"
    whole = reply(b"a" * 3000)
    first.answer(slow(whole, pieces=6, pause_s=RESPONSE_TIMEOUT_S * 0.4))
    assert one.red.ask("/openstack").body == b"a" * 3000
    assert len(first.requests) == 2


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("then", ["close", "reset", "hang"])
def test_a_guest_notices_that_an_answer_is_not_whole(
    one: NovaGuests, then: str, method: str
) -> None:
    ends = {"close": close_without_a_byte(), "reset": reset(), "hang": hang()}
    whole = reply(b"a" * 100_000)
    one.novas[0].answer(half(whole, then=ends[then].then))
    start = time.monotonic()
    try:
        answer = one.red.ask(_PASSWORD, method=method, body=_BODY if method == "POST" else b"")
    except Lost:
        pass
    else:
        assert answer.is_to_come_again
    assert time.monotonic() - start < (RESPONSE_TIMEOUT_S + 1.0) * patience()
    if method == "POST":
        assert len(one.novas[0].heads) == 1


# Two of them


def _until_asked(nova: Recorder, *, more_than: int = 0) -> None:
    until(lambda: len(nova.requests) > more_than, what="a request to it")


def _heads(world: NovaGuests) -> int:
    return sum(len(nova.heads) for nova in world.novas)


_UNSAID: Final = ("a reset after it has read", "a close without a byte", "no HTTP")


@pytest.mark.parametrize("name", _UNSAID)
def test_a_get_that_one_nova_does_not_answer_is_asked_of_the_other(
    both: NovaGuests, name: str
) -> None:
    for ill, well in (both.novas, reversed(both.novas)):
        both.forget()
        ill.always(_FAULTS[name])
        for _ in range(6):
            answer = both.red.ask("/openstack/latest?a")
            assert (answer.status, answer.body) == (200, b"/openstack/latest?a")
        assert len(well.requests) == 6
        assert ill.requests


@pytest.mark.parametrize("name", sorted(_FAULTS))
def test_a_post_is_sent_once_whatever_becomes_of_it(both: NovaGuests, name: str) -> None:
    for nova in both.novas:
        nova.always(_FAULTS[name])
    assert _post(both.red).is_to_come_again
    assert _heads(both) == 1


def test_a_post_goes_to_the_other_nova_when_one_refuses_connections(both: NovaGuests) -> None:
    first, second = both.novas
    first.refuse()
    for number in range(1, 7):
        assert _post(both.red).status == 200
        assert len(second.heads) == number
    assert not first.heads


def test_a_post_never_takes_a_connection_that_nova_may_be_closing(both: NovaGuests) -> None:
    with both.red.connect() as kept:
        for method, body in (("GET", b""), ("POST", _BODY)) * 6:
            assert kept.request(_PASSWORD, method=method, body=body).status == 200
            assert kept.request("/openstack").status == 200
    sent = 0
    for nova in both.novas:
        used = [one.connection for one in nova.requests]
        posts = [one.connection for one in nova.requests if one.method == "POST"]
        assert all(used.count(connection) == 1 for connection in posts)
        sent += len(posts)
    assert sent == 6


def test_a_get_survives_that_its_nova_dies_while_it_works(both: NovaGuests) -> None:
    first, second = both.novas
    for victim, heir in ((first, second), (second, first)):
        both.forget()
        _until_both_answer(both)
        both.forget()
        victim.always(hang())
        heir.default = lambda _: reply(b"from the heir")
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(both.red.ask, "/openstack") for _ in range(4)]
            _until_asked(victim)
            victim.kill()
            assert {one.result().body for one in asked} == {b"from the heir"}
        victim.listen()


def test_nobody_loses_a_get_while_novas_die_and_come_back(both: NovaGuests) -> None:
    def wrong(guest: Guest, answer: Reply) -> str | None:
        return None if answer.status == 200 else f"{guest.name} {answer.status}"

    with Load([both.red, both.green], "/openstack", wrong, connections=2) as load:
        for _ in range(2):
            for nova in both.novas:
                load.wait_answers(50)
                nova.kill()
                load.wait_answers(50)
                nova.listen()
                _until_asked(nova, more_than=len(nova.requests))
    assert not load.report.lost
