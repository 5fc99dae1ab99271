from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imdsproxy.core.haproxy.audit import AuditLines, read_audit
from imdsproxy.core.model import InstanceId, NetworkId
from imdsproxy.core.tokens import TokenKey, mint_token

LINE = b'{"number":1}\n'
NOW = 1_760_000_000.5


def test_plain_lines_are_left_as_they_are() -> None:
    assert read_audit(LINE * 3, NOW) == AuditLines(LINE * 3, 3)
    assert read_audit(b"", NOW) == AuditLines(b"", 0)


def test_what_haproxy_has_left_out_is_told_and_what_it_says_of_itself_is_not() -> None:
    text = LINE + b"1234 events dropped\0\n1 event dropped\0\nProxy guests stopped (x).\n" + LINE
    read = read_audit(text, NOW)
    one, many, single, other = map(json.loads, read.text.splitlines())
    assert (one["number"], many["left_out"], single["left_out"], other["number"]) == (1, 1234, 1, 1)
    assert (many["time"], read.requests, read.left_out) == (NOW, 2, 1235)


def test_text_beyond_ascii_stays_and_what_is_none_is_marked() -> None:
    read = read_audit('{"agent":"é 😀 '.encode() + b'\xff\tz"}\n', NOW)
    assert json.loads(read.text) == {"agent": "é 😀 \ufffd\tz"}


@pytest.mark.parametrize("cut", [0, 40])
def test_a_token_is_no_part_of_a_line_wherever_a_guest_puts_it(cut: int) -> None:
    key = TokenKey(b"k" * 32)
    token = mint_token(key, NetworkId("blue"), InstanceId("vm"), 0, int(NOW) + 21_600)
    text = token[: len(token) - cut]
    line = f'{{"path":"/latest/{text}/x","agent":"curl {text}"}}\n'
    line_read = json.loads(read_audit(line.encode(), NOW).text)
    assert line_read == {"path": "/latest/(token)/x", "agent": "curl (token)"}


def _as_haproxy(agent: bytes) -> bytes:
    # Its log format escapes these two; no header has the other three.
    line_read = agent.replace(b"\\", b"\\\\").replace(b'"', b'\\"')
    return b'{"agent":"' + line_read.translate(None, b"\0\r\n") + b'"}\n'


@given(st.lists(st.binary(max_size=40), max_size=5))
def test_every_line_is_json_whatever_a_guest_says(agents: list[bytes]) -> None:
    read = read_audit(b"".join(map(_as_haproxy, agents)), NOW)
    lines = read.text.split(b"\n")
    assert lines.pop() == b""
    assert [list(json.loads(line)) for line in lines] == [["agent"]] * len(agents)
    assert (read.requests, read.left_out) == (len(agents), 0)


@given(st.binary(max_size=200))
def test_nothing_at_all_makes_it_fail(text: bytes) -> None:
    read_audit(text, NOW)
