from __future__ import annotations

import re
from pathlib import Path

import pytest

from imdsproxy.core.haproxy.audit import (
    AUDIT_LONGEST,
    audit_found,
    audit_ring,
    audit_rules,
    marked,
    passed,
    silence_told,
    without_marks,
)
from imdsproxy.core.haproxy.guard import guard_rules
from imdsproxy.core.haproxy.watching import AnsweredBy, Watched, parse_events, watch_rules
from imdsproxy.dataplane.layout import Layout

PATHS = Layout(runtime=Path("/run/x"), state=Path("/var/x")).haproxy_paths()
LAST = "/audit-last.sock"
LINE = (
    '{"time":1795684004.318,"number":17,"network":"blue","address":"10.0.0.5","instance":"vm-1",'
    '"method":"GET","path":"\\/latest\\/user-data","status":200,"token":"no","refused":"-",'
    '"by":"documents/documents-0","ms":3,"agent":"curl\\/8"}'
)


def _text(**options: bool) -> str:
    return " ".join(word for rule in audit_rules(1, LAST, **options) for word in rule)


def test_there_are_no_rules_where_it_is_off() -> None:
    assert not (
        *audit_rules(0, LAST),
        *audit_rules(0, LAST, watched=True),
        *audit_found(0),
        *silence_told(0),
    )


def test_a_sample_is_silent_but_for_one_of_so_many() -> None:
    silent = ("http-request", "set-log-level", "silent", "unless", "{", "rand(7)", "0", "}")
    assert silent in audit_rules(7, LAST)
    assert silent not in audit_rules(1, LAST)


def test_who_watches_sees_all_while_a_sample_is_audited() -> None:
    rules = audit_rules(7, LAST, watched=True)
    assert not [rule for rule in rules if "silent" in rule]
    assert "sample 1:7" in " ".join(rules[0])
    assert watch_rules(audited=True)[0][:2] == ("log", "ring@watched")
    assert not [rule for rule in watch_rules(audited=True) if rule[0] == "log-format"]


@pytest.mark.parametrize("nova", [False, True])
@pytest.mark.parametrize("headers", [False, True])
def test_a_line_has_nothing_that_may_be_secret(*, nova: bool, headers: bool) -> None:
    text = _text(nova=nova, headers=headers)
    assert "capture.req.uri,field(1,?)" in text
    assert not re.search(
        r"query|pathq|\burl\b|%r\b|%HQ|%HU|%hr|txn\.token|txn\.said|txn\.mac|field\(2", text
    )
    assert text.count("txn.record") == 1
    assert re.findall(r"capture request header \S+", text) == ["capture request header User-Agent"]


@pytest.mark.parametrize("headers", [False, True])
def test_whatever_a_guest_says_is_escaped(*, headers: bool) -> None:
    said = (
        r"%(\S{7})?\[(capture|req|var\(sess)[^\]]*\]"
        if headers
        else r"%(\S{7})?\[(capture|req)[^\]]*\]"
    )
    found = re.findall(said, _text(headers=headers))
    assert [escape for escape, _ in found] == ["{+json}"] * (4 if headers else 2)


def test_the_longest_line_has_room() -> None:
    # HAProxy's copy of a request line, all quotes; 200 bytes of `User-Agent`, the same.
    most = 2 * 1024 + 2 * 200 + 2 * 2 * 64 + 4 * 64 + 300
    assert most < AUDIT_LONGEST
    ring = dict(words[:2] for words in audit_ring("/audit.sock").lines if len(words) == 2)
    assert int(ring["maxlen"]) == AUDIT_LONGEST
    assert f"len {AUDIT_LONGEST} " in _text()


def test_refusals_are_marked_only_where_lines_are_written() -> None:
    rules = guard_rules(PATHS, audited=True)
    told = [rule[2] for rule in rules if rule[1] == "set-var(txn.refused)"]
    assert told == [
        "str(endpoint)",
        "str(path)",
        "str(token)",
        "str(forwarded)",
        "str(token-request)",
        "str(no-key)",
        "str(no-path-rules)",
        "str(path-denied)",
        "str(token-required)",
        "str(path-required)",
        "str(forwarded)",
        "str(sealed)",
    ]
    assert rules[-1][1] == "unset-var(txn.refused)"
    assert guard_rules(PATHS) == without_marks(rules)
    text = str(without_marks(rules))
    assert "txn.refused" not in text
    assert "heard" not in text


def test_each_refusal_of_the_guard_comes_after_a_mark() -> None:
    marks = 0
    for rule in guard_rules(PATHS, audited=True):
        marks += rule[1] == "set-var(txn.refused)"
        assert marks or rule[1] != "return"
    assert marks


def test_marks_have_the_condition_that_they_are_given() -> None:
    asked = ("{", "var(txn.asked)", "-m", "found", "}")
    assert marked("seal") == ("http-request", "set-var(txn.refused)", "str(seal)")
    assert marked("seal", asked) == (
        "http-request",
        "set-var(txn.refused)",
        "str(seal)",
        "if",
        *asked,
    )
    assert passed() == ("http-request", "unset-var(txn.refused)")


def test_who_watches_reads_lines_of_the_audit_log() -> None:
    assert parse_events(f"1 event dropped\n{LINE}\n") == [
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


@pytest.mark.parametrize("line", [LINE[:-1], "{}", '{"by":"x"}'])
def test_what_is_no_line_of_the_audit_log_is_left_out(line: str) -> None:
    assert parse_events(line) == []


def test_a_request_that_was_none_is_watched_without_a_method() -> None:
    bad = LINE.replace('"GET"', '"<BADREQ>"').replace('"\\/latest\\/user-data"', '"-"')
    (found,) = parse_events(bad.replace('"vm-1"', '"!"').replace('"ms":3', '"ms":-1'))
    assert (found.method, found.path, found.instance, found.milliseconds) == ("", "", None, 0)
