from __future__ import annotations

import re
from dataclasses import replace

import pytest

from imdsproxy.core.haproxy.audit import AUDIT_LONGEST
from imdsproxy.core.haproxy.config import render_config
from imdsproxy.core.haproxy.model import NovaBackend, UnixBind
from imdsproxy.core.haproxy.watching import AnsweredBy, Watched, parse_events
from support.haproxy_config import SPEC, read_rules

AUDITED = replace(SPEC, unix=UnixBind("/run/a", "0600", 0, 0), audit=1)
LINE = (
    '{"time":1795684004.318,"number":17,"network":"blue","address":"10.0.0.5","instance":"vm-1",'
    '"method":"GET","path":"\\/latest\\/user-data","status":200,"token":"no","refused":"-",'
    '"by":"documents/documents-0","ms":3,"agent":"curl\\/8"}'
)


def _rules(header: str = "frontend guests", **options: object) -> list[tuple[str, ...]]:
    return read_rules(replace(AUDITED, **options), header)  # type: ignore[arg-type] # any field


def _text(*, nova: bool = False, headers: bool = False) -> str:
    """The frontend's rules for its log."""
    sets = (NovaBackend("default", (), "nova"),) if nova else ()
    rules = _rules("frontend agents" if headers else "frontend guests", nova=sets)
    return " ".join(" ".join(rule) for rule in rules if rule[0] in {"log", "log-format", "capture"})


def test_there_are_no_rules_where_it_is_off() -> None:
    text = render_config(replace(AUDITED, audit=0))
    assert not re.search("audit|log|txn.refused|txn.auth", text)
    assert "ring@audit" not in render_config(replace(AUDITED, audit=0, watched=True))


def test_a_sample_is_silent_but_for_one_of_so_many() -> None:
    silent = ("http-request", "set-log-level", "silent", "unless", "{", "rand(7)", "0", "}")
    assert silent in _rules(audit=7)
    assert not [rule for rule in _rules(audit=1) if "silent" in rule]


def test_who_watches_sees_all_while_a_sample_is_audited() -> None:
    rules = _rules(audit=7, watched=True)
    assert not [rule for rule in rules if "silent" in rule]
    logs = [" ".join(rule) for rule in rules if rule[0] == "log"]
    assert [("sample 1:7" in log) for log in logs] == [False, True, True]
    assert logs[0].startswith("log ring@watched")
    assert len([rule for rule in rules if rule[0] == "log-format"]) == 1


@pytest.mark.parametrize("nova", [False, True])
@pytest.mark.parametrize("headers", [False, True])
def test_a_line_has_nothing_that_may_be_secret(*, nova: bool, headers: bool) -> None:
    text = _text(nova=nova, headers=headers)
    assert "capture.req.uri,field(1,?)" in text
    assert not re.search(
        r"query|pathq|\burl\b|%r\b|%HQ|%HU|%hr|txn\.token|txn\.path_rule|txn\.mac|field\(2", text
    )
    assert text.count("txn.record") == 1
    assert re.findall(r"capture request header \S+", text) == ["capture request header User-Agent"]


@pytest.mark.parametrize("headers", [False, True])
def test_whatever_a_guest_says_is_escaped(*, headers: bool) -> None:
    pattern = (
        r"%(\S{7})?\[(capture|req|var\(sess)[^\]]*\]"
        if headers
        else r"%(\S{7})?\[(capture|req)[^\]]*\]"
    )
    found = re.findall(pattern, _text(headers=headers))
    assert [escape for escape, _ in found] == ["{+json}"] * (4 if headers else 2)


def test_the_longest_line_has_room() -> None:
    # HAProxy's copy of a request line, all quotes; 200 bytes of `User-Agent`, the same.
    most = 2 * 1024 + 2 * 200 + 2 * 2 * 64 + 4 * 64 + 300
    assert most < AUDIT_LONGEST
    ring = dict(words[:2] for words in _rules("ring audit") if len(words) == 2)
    assert int(ring["maxlen"]) == AUDIT_LONGEST
    assert f"len {AUDIT_LONGEST} " in _text()


def test_refusals_are_marked_only_where_lines_are_written() -> None:
    rules = _rules("backend documents.checked")
    marks = [rule[2] for rule in rules if rule[1] == "set-var(txn.refused)"]
    assert marks == [
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
    unmarked = [rule for rule in rules if not re.search(r"txn\.(refused|auth)\b", rule[1])]
    assert unmarked == _rules("backend documents.checked", audit=0)


def test_each_refusal_of_a_checked_backend_comes_after_a_mark_and_others_after_none() -> None:
    marked = False
    checks = 0
    for rule in _rules("backend documents.checked"):
        marked = rule[1] == "set-var(txn.refused)" or (
            marked and not (rule[1] == "unset-var(txn.refused)" and "if" not in rule)
        )
        if rule[1:3] == ("return", "status") and rule[3] not in {"200", "405"}:
            checks += 1
            # Lengths of bodies are refused for everybody, and that is no rule of a policy.
            assert marked or rule[3] == "400"
    assert checks
    assert not marked


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
