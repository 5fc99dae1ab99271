"""Last answers to guests' requests for identity tokens: by audience, for the right guest, in bounded memory."""

import json
import tracemalloc
from dataclasses import replace
from typing import Final

import pytest

from imdsproxy.issuer.claims import Refusal, is_audience
from imdsproxy.issuer.exchange import Token
from imdsproxy.issuer.holder import Held
from imdsproxy.issuer.recent import (
    GIVEN,
    MOST_AUDIENCES,
    MOST_GUESTS,
    TOO_MANY,
    UNASKED,
    UNSIGNED,
    LastAnswer,
    RecentAnswers,
    parse_answers,
    render_answers,
)
from imdsproxy.model.entities import InstanceId, NetworkId
from imdsproxy.model.subject import Subject

_SUBJECT: Final = Subject(
    InstanceId("web"), NetworkId("red"), "p", created_at=5, audiences=("vault",)
)
_TOKEN_ID: Final = "0e0a2b6e-7d0b-4a5c-9a58-0c6f1f1c0d11"
_HELD: Final = Held(Token("header.claims.signature", _TOKEN_ID, 1_800_000_600, 600), since=10.0)
_KIB: Final = 1024


def _audiences(recent: RecentAnswers, subject: Subject = _SUBJECT) -> list[str]:
    return [one.audience for one in recent.list_answers(subject, {})]


def test_an_answer_has_the_token_s_id_and_its_end_and_never_the_token() -> None:
    recent = RecentAnswers()
    recent.note(_SUBJECT, "vault", _HELD, 1_800_000_000.7)
    assert recent.list_answers(_SUBJECT, {}) == [
        LastAnswer("vault", GIVEN, 1_800_000_000, _TOKEN_ID, 1_800_000_600)
    ]
    assert "signature" not in repr(recent)


@pytest.mark.parametrize(
    ("found", "outcome"),
    [(None, TOO_MANY), (UNSIGNED, UNSIGNED), *((one, one.value) for one in Refusal)],
)
def test_an_answer_without_a_token_has_its_reason(
    found: Refusal | str | None, outcome: str
) -> None:
    recent = RecentAnswers()
    recent.note(_SUBJECT, "vault", found, 7)
    assert recent.list_answers(_SUBJECT, {}) == [LastAnswer("vault", outcome, 7)]


def test_an_audience_has_its_last_answer_alone_and_the_newest_comes_first() -> None:
    recent = RecentAnswers()
    for at, audience in enumerate(("a", "b", "a")):
        recent.note(_SUBJECT, audience, _HELD, at)
    assert [(one.audience, one.at) for one in recent.list_answers(_SUBJECT, {})] == [
        ("a", 2),
        ("b", 1),
    ]


def test_a_guest_that_tries_audiences_it_may_not_have_loses_one_place_by_it() -> None:
    recent = RecentAnswers()
    recent.note(_SUBJECT, "vault", _HELD, 1)
    for number in range(50):
        recent.note(_SUBJECT, f"other-{number}", Refusal.AUDIENCE, 2)
    assert _audiences(recent) == ["other-49", "vault"]


def test_a_token_fetched_ahead_is_shown_as_ready_and_as_not_requested() -> None:
    recent = RecentAnswers()
    recent.note(_SUBJECT, "vault", Refusal.UNREADABLE, 1)
    found = recent.list_answers(_SUBJECT, {"vault": _HELD, "keystone": _HELD})
    assert found == [
        LastAnswer("vault", "unreadable", 1, ready_id=_TOKEN_ID, ready_until=1_800_000_600),
        LastAnswer("keystone", UNASKED, ready_id=_TOKEN_ID, ready_until=1_800_000_600),
    ]


def test_answers_outlast_a_change_of_the_policy_and_are_no_other_guest_s() -> None:
    recent = RecentAnswers()
    recent.note(_SUBJECT, "vault", _HELD, 1)
    assert _audiences(recent, replace(_SUBJECT, audiences=("keystone",))) == ["vault"]
    others = (
        replace(_SUBJECT, instance=InstanceId("db")),
        replace(_SUBJECT, network=NetworkId("blue")),
        replace(_SUBJECT, project="q"),
        # The same name again, for an instance that was created later.
        replace(_SUBJECT, created_at=6),
        replace(_SUBJECT, epoch=1),
    )
    assert [_audiences(recent, one) for one in others] == [[]] * len(others)


def test_the_guest_with_the_oldest_answer_is_forgotten_first() -> None:
    recent = RecentAnswers()
    subjects = [replace(_SUBJECT, instance=InstanceId(f"i{one}")) for one in range(MOST_GUESTS + 1)]
    for one in subjects[:-1]:
        recent.note(one, "vault", _HELD, 1)
    recent.note(subjects[0], "vault", _HELD, 2)
    recent.note(subjects[-1], "vault", _HELD, 3)
    known = [bool(_audiences(recent, one)) for one in (subjects[0], subjects[1], subjects[-1])]
    assert known == [True, False, True]


def test_a_guest_takes_a_kibibyte_at_most() -> None:
    audiences = [f"{number}".ljust(128, "x") for number in range(2 * MOST_AUDIENCES)]
    assert all(map(is_audience, audiences))
    guests = 2000
    subjects = [
        replace(_SUBJECT, instance=InstanceId(f"i{one}".ljust(64, "x"))) for one in range(guests)
    ]
    recent = RecentAnswers()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for subject in subjects:
            for audience in audiences:
                recent.note(subject, audience, _HELD, 1_800_000_000)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(recent.list_answers(subjects[0], {})) == MOST_AUDIENCES
    assert (after - before) / guests <= _KIB


def test_answers_are_read_as_they_are_written() -> None:
    answers = [LastAnswer("vault", GIVEN, 1, _TOKEN_ID, 2, "other", 3), LastAnswer("a", UNASKED)]
    assert parse_answers(json.dumps(render_answers(answers)).encode()) == answers


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b'{"answers": [{"audience": "a"}]}',
        b'{"answers": [{"audience": 1, "outcome": "given"}]}',
        b'{"answers": [{"audience": "a", "outcome": "given", "at": "now"}]}',
        b'{"answers": [{"audience": "a", "outcome": "given", "at": true}]}',
        b'{"answers": [{"audience": "a", "outcome": "given", "token": "a.b.c"}]}',
        b'{"answers": ' + b"[" * 100_000,
    ],
)
def test_other_bytes_are_no_answers(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"answers|Expecting"):
        parse_answers(data)
