"""The checker of a fleet's history notices each answer that no guest may get, and lets right ones pass."""

import pytest

from support.fleet_history import Answer, History, Outcome, Write

A, B = frozenset({"a"}), frozenset({"b"})
APPLIED, UNKNOWN, REFUSED = Outcome.APPLIED, Outcome.UNKNOWN, Outcome.REFUSED


def write(
    version: int, sent: float, outcome: Outcome = APPLIED, hosts: frozenset[str] = A
) -> Write:
    return Write("i1", version, hosts, sent, sent + 1, outcome)


def answer(begun: float, text: str = "", status: int | None = 200, host: str = "a") -> Answer:
    return Answer(host, "i1", begun, begun + 0.5, status, text)


def violations(
    writes: list[Write], answers: list[Answer], *resets: tuple[float, float]
) -> list[str]:
    found = History(writes, answers, list(resets)).violations()
    return [one.partition("): ")[2] for one in found]


@pytest.mark.parametrize(
    ("writes", "answers", "words"),
    [
        ([write(1, 0)], [answer(2, "i2-v1")], "another instance's document"),
        ([write(1, 0)], [answer(2, "")], "another instance's document"),
        ([write(1, 0)], [answer(2, "i1-v2")], "a version that was never committed"),
        ([write(1, 9)], [answer(2, "i1-v1")], "a version that was never committed"),
        ([write(1, 0, REFUSED)], [answer(2, "i1-v1")], "a version that was never committed"),
        (
            [write(1, 0, hosts=B)],
            [answer(2, "i1-v1")],
            "a version that was never placed on this host",
        ),
        (
            [write(1, 0, UNKNOWN), write(2, 1, UNKNOWN)],
            [answer(3, "i1-v2"), answer(4, "i1-v1")],
            "older than version 2, which this host answered before",
        ),
        (
            [write(1, 0), write(2, 2)],
            [answer(4, "i1-v1")],
            "older than version 2, which was acknowledged",
        ),
        ([write(1, 0)], [answer(2, status=404)], "404 for what is in force since version 1"),
    ],
)
def test_what_no_guest_may_get_is_noticed(
    writes: list[Write], answers: list[Answer], words: str
) -> None:
    assert violations(writes, answers) == [words]


@pytest.mark.parametrize(
    ("writes", "answers"),
    [
        ([write(1, 0), write(2, 2)], [answer(2.5, "i1-v1"), answer(2.6, "i1-v2")]),
        ([write(1, 0), write(2, 2, UNKNOWN)], [answer(5, "i1-v1"), answer(6, "i1-v2")]),
        ([write(1, 0)], [answer(0.1, status=404), answer(3, status=503), answer(4, status=None)]),
        ([write(1, 0), write(2, 2, UNKNOWN, hosts=B)], [answer(3, status=404)]),
        ([write(1, 0), write(2, 2, hosts=B)], [answer(2.5, "i1-v1"), answer(4, "i1-v2", host="b")]),
    ],
)
def test_what_guests_may_get_passes(writes: list[Write], answers: list[Answer]) -> None:
    assert not violations(writes, answers)


def test_after_a_restore_was_accepted_older_versions_are_right_and_no_older_than_later_writes() -> (
    None
):
    writes = [write(1, 0), write(2, 2), write(3, 20)]
    assert not violations(writes, [answer(5, "i1-v2"), answer(11, "i1-v1")], (9.0, 10.0))
    assert violations(writes, [answer(11, "i1-v2"), answer(22, "i1-v1")], (9.0, 10.0))


@pytest.mark.parametrize(
    ("begun", "text", "status", "noticed"),
    [
        (2, "refused", None, True),
        (2, "", 503, True),
        (2, "No route to host", None, False),
        (5, "No route to host", None, True),
        (0.5, "refused", None, False),
        (2, "i1-v1", 200, False),
    ],
)
def test_a_guest_that_is_not_answered_what_is_in_force_is_noticed(
    begun: float, text: str, status: int | None, *, noticed: bool
) -> None:
    asked = answer(begun, text, status)
    assert History([write(1, 0)], [asked]).unserved() == ([asked] if noticed else [])
