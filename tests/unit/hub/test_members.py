"""Which member of etcd is asked."""

from collections.abc import Sequence
from random import Random

import pytest

from imdsproxy.hub.store.etcd_members import Members
from support.hand_clock import HandClock

URLS = ("https://a:2378", "https://b:2378", "https://c:2378")


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


def members(clock: HandClock, seed: int = 1, urls: Sequence[str] = URLS) -> Members:
    return Members(urls, random=Random(seed), clock=clock)  # noqa: S311


def test_hubs_begin_with_different_members(clock: HandClock) -> None:
    assert {members(clock, seed).choose()[0] for seed in range(20)} == set(URLS)


def test_the_member_that_answers_is_asked_on(clock: HandClock) -> None:
    made = members(clock)
    first, _ = made.choose()
    for _ in range(5):
        made.succeed(first)
        assert made.choose() == (first, 0.0)


def test_each_other_member_comes_before_one_that_failed(clock: HandClock) -> None:
    made = members(clock)
    seen = []
    for _ in URLS:
        url, pause = made.choose()
        assert pause == 0
        made.fail(url, "it is down")
        seen.append(url)
    assert sorted(seen) == sorted(URLS)
    assert made.choose()[1] > 0
    assert made.failures.count("it is down") == 3


def test_a_member_that_goes_on_failing_rests_for_longer_with_jitter(clock: HandClock) -> None:
    pauses: dict[int, list[float]] = {}
    for seed in (1, 2):
        made = members(clock, seed, URLS[:1])
        for _ in range(10):
            made.fail(URLS[0], "it is down")
            pauses.setdefault(seed, []).append(made.choose()[1])
    assert pauses[1] != pauses[2]
    assert pauses[1][0] <= 0.05
    assert 1.0 <= pauses[1][-1] <= 2.0
    made.succeed(URLS[0])
    assert made.choose() == (URLS[0], 0.0)
    assert made.failures == ""


def test_a_member_that_has_rested_is_asked_again(clock: HandClock) -> None:
    made = members(clock, urls=URLS[:1])
    made.fail(URLS[0], "it is down")
    clock.time += 0.05
    assert made.choose() == (URLS[0], 0.0)


def test_a_lost_quorum_is_called_that_once_each_member_was_asked(clock: HandClock) -> None:
    made, called = members(clock), list[str | None]()
    made.fail(URLS[0], "etcdserver: no leader", answers=True)
    made.fail(URLS[1], "connection refused")
    # The third may know a leader.
    called.append(made.lost_quorum)
    made.fail(URLS[2], "connection refused")
    called.append(made.lost_quorum)
    made.fail(URLS[1], "etcdserver: request timed out", answers=True)
    called.append(made.lost_quorum)
    made.succeed(URLS[1])
    called.append(made.lost_quorum)
    for url in URLS:
        made.fail(url, "connection refused")
    called.append(made.lost_quorum)
    quorum, leader = "no quorum: 1 of 3 members answer", "no leader: 2 of 3 members answer"
    assert called == [None, quorum, leader, None, None]
