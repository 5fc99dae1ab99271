from __future__ import annotations

from dataclasses import replace

import pytest

from imdsproxy.core.haproxy.watching import AnsweredBy, Watched, parse_events
from support.haproxy_config import SPEC, read_rules

LINE = "17 1795684004318 blue 10.0.0.5 vm-1 - 200 3 documents documents-0 GET /latest/user-data"


def test_a_line_is_a_request() -> None:
    assert parse_events(LINE + "\n\n") == [
        Watched(
            number=17,
            at=1795684004.318,
            network="blue",
            address="10.0.0.5",
            instance="vm-1",
            method="GET",
            path="/latest/user-data",
            status=200,
            answered_by=AnsweredBy.DOCUMENTS,
            milliseconds=3,
        )
    ]


@pytest.mark.parametrize(
    ("first", "third", "instance"),
    [
        ("vm-1", "-", "vm-1"),
        ("@default", "i-1", "i-1"),
        ("!", "-", None),
        ("-", "-", None),
    ],
)
def test_the_instance_is_the_records(first: str, third: str, instance: str | None) -> None:
    (found,) = parse_events(LINE.replace("vm-1 -", f"{first} {third}"))
    assert found.instance == instance


@pytest.mark.parametrize(
    ("served", "by"),
    [
        ("guests <CACHE>", AnsweredBy.CACHE),
        ("documents <CACHE>", AnsweredBy.CACHE),
        ("documents documents-1", AnsweredBy.DOCUMENTS),
        ("documents <NOSRV>", AnsweredBy.DOCUMENTS),
        ("nova.default 192.0.2.1:8775", AnsweredBy.NOVA),
        ("nova.default.once 192.0.2.1:8775", AnsweredBy.NOVA),
        ("resolver resolver", AnsweredBy.RESOLVER),
        ("conflict <NOSRV>", AnsweredBy.CONFLICT),
        ("guests <NOSRV>", AnsweredBy.CACHE),
        ("agents <NOSRV>", AnsweredBy.CACHE),
        ("documents.checked <NOSRV>", AnsweredBy.DOCUMENTS),
    ],
)
def test_who_answered_is_told(served: str, by: AnsweredBy) -> None:
    (found,) = parse_events(LINE.replace("documents documents-0", served))
    assert found.answered_by is by


def test_a_frontend_that_refuses_answers_by_itself() -> None:
    refused = LINE.replace("documents documents-0", "guests <NOSRV>").replace("200 3", "400 3")
    (found,) = parse_events(refused)
    assert found.answered_by is AnsweredBy.HAPROXY


def test_a_request_that_was_none_is_told_without_a_method() -> None:
    (found,) = parse_events("1 2 blue 10.0.0.5 - - 400 -1 guests <NOSRV> -")
    assert (found.method, found.path, found.milliseconds) == ("", "", 0)


@pytest.mark.parametrize(
    "line",
    ["Proxy guests stopped (cumulated conns: FE: 1, BE: 0).", "", "17 x blue", LINE[:40]],
)
def test_what_is_no_line_of_ours_is_left_out(line: str) -> None:
    assert parse_events(f"{line}\n{LINE}\n") == parse_events(LINE)


def test_a_line_has_nothing_that_may_be_secret() -> None:
    rules = read_rules(replace(SPEC, watched=True), "frontend guests")
    text = " ".join(
        " ".join(one)
        for one in rules
        if one[0] == "log-format" or "set-var-fmt(txn.watched)" in one
    )
    assert "%[method] %[path]" in text
    assert "query" not in text
    assert "pathq" not in text
    assert "hdr" not in text
    assert "field(2," not in text
    # Of the record's fields: the instance, and never what stands in between.
    assert text.count("txn.record") == 2
