"""Lines of a host's stream, both ways: whatever a captured machine sends is a message that fits, or `Broken`."""

import json
from collections.abc import Mapping

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from imdsproxy.fleet.codec import MOST_NUMBER, MOST_TEXT
from imdsproxy.fleet.stream import (
    Ack,
    Answer,
    Batch,
    Broken,
    FromHost,
    FromHub,
    Hello,
    Ping,
    parse_from_host,
    parse_from_hub,
    render_line,
)

_NUMBERS = st.integers() | st.floats() | st.sampled_from([2**63, 2**63 - 1, 10**400, True, -1])
_TEXTS = st.text(max_size=5) | st.sampled_from(["\ud800", "\x1b[2J", "x" * 5000, "instance/a"])
_JSON = st.recursive(
    st.none() | st.booleans() | _NUMBERS | _TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXTS, inner, max_size=3),
    max_leaves=6,
)
_ITEMS = st.dictionaries(
    _TEXTS
    | st.sampled_from(["network/n", "policy/host/h", "keys/", "instance/a\n", "override/../x"]),
    _JSON,
    max_size=3,
)
_FIELDS = {
    "host": ["format", "fleet", "incarnation", "revision", "digest", "status", "body"],
    "hub": ["revision", "fleet", "incarnation", "put", "remove", "held", "time", "age_s", "path"],
}
_KINDS = {"host": ["hello", "ack", "answer"], "hub": ["batch", "ping", "ask", "bye"]}


def _lines(side: str) -> st.SearchStrategy[dict[str, object]]:
    inner = st.dictionaries(
        st.sampled_from([*_FIELDS[side], "items", "failed"]), _ITEMS | _JSON, max_size=5
    )
    keys = st.sampled_from([*_KINDS[side], *_FIELDS[side], "failed", "reason"])
    return st.dictionaries(keys, inner | _ITEMS | _JSON, max_size=5)


def _render(line: Mapping[str, object]) -> bytes:
    return json.dumps(line).encode()


def _numbers(message: FromHost | FromHub) -> list[int]:
    match message:
        case Hello():
            return [message.incarnation, message.revision, message.format, *message.items.values()]
        case Ack(revision):
            return [revision]
        case Answer(number, status):
            return [number, status]
        case Batch():
            puts = (revision for revision, _ in message.put.values())
            return [message.revision, message.incarnation, *puts]
        case Ping(revision):
            return [revision]
        case _:
            return []


def _texts(message: FromHost | FromHub) -> list[str]:
    match message:
        case Hello():
            return [message.fleet or "", *message.items]
        case Ack():
            return [message.digest, *message.failed, *message.failed.values()]
        case Batch():
            return [message.fleet, *message.held.values()]
        case _:
            return []


_HELLO: dict[str, object] = {"format": 1, "incarnation": 1}


@given(_lines("host"))
@example({"hello": {**_HELLO, "items": {"instance/" + "x" * 2_000_000: 1}}})
@example({"hello": {**_HELLO, "items": {"instance/../../meta": 1}}})
@example({"hello": {**_HELLO, "items": {"instance/web": 10**400}}})
@example({"hello": {**_HELLO, "revision": True}})
@example({"ack": 1, "failed": {"instance/web": "\ud800\x1b[2J" + "x" * 9999}})
@example({"ack": 1, "failed": {"instance/web": [1, 2]}, "digest": "f" * 99})
@example({"answer": 1, "status": -(2**70), "body": [1, 2]})
def test_a_line_of_a_host_fits_or_is_broken(line: dict[str, object]) -> None:
    try:
        message = parse_from_host(_render(line))
    except Broken:
        return
    assert all(0 <= one <= MOST_NUMBER for one in _numbers(message))
    assert all(len(one) <= MOST_TEXT and one.isprintable() for one in _texts(message))


@given(_lines("hub"))
@example({"ping": {"revision": 1, "time": 10**400}})
@example({"ping": {"revision": 1, "time": float("nan")}})
@example({"batch": {"revision": 1, "put": {"instance/web": [2**70, {}]}}})
def test_a_line_of_a_hub_fits_or_is_broken(line: dict[str, object]) -> None:
    try:
        message = parse_from_hub(_render(line))
    except Broken:
        return
    assert all(0 <= one <= MOST_NUMBER for one in _numbers(message))
    assert all(len(one) <= MOST_TEXT and one.isprintable() for one in _texts(message))


@given(st.binary(max_size=40))
@example(b"[" * 100_000)
@example(b'{"ack":' + b"9" * 10_000 + b"}")
def test_bytes_that_are_no_line_are_broken(line: bytes) -> None:
    for parse in (parse_from_host, parse_from_hub):
        with pytest.raises(Broken):
            parse(line)


@pytest.mark.parametrize(
    "message",
    [
        Hello("f", 2, 9, {"instance/web": 7, "policy/project/p.1": 3, "policy/fleet": 2}),
        Hello(),
        Ack(9, {"network/blue": "listener: bridge blue is missing"}, "0f" * 16),
        Answer(3, 200, {"a": [1, 2]}),
    ],
)
def test_what_a_host_says_is_read_as_it_was_said(message: FromHost) -> None:
    assert parse_from_host(render_line(message)) == message
