from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imdsproxy.core.haproxy.request_log import AnsweredBy, Watched, parse_events, read_audit
from imdsproxy.core.model import InstanceId, NetworkId
from imdsproxy.core.tokens import TokenKey
from support.haproxy_alone import mint_token

LINE = (
    '{"time":1795684004.318,"number":17,"network":"blue","address":"10.0.0.5","instance":"vm-1",'
    '"method":"GET","path":"\\/latest\\/user-data","status":200,"token":"no","refused":"-",'
    '"by":"documents/documents-0","ms":3,"agent":"curl\\/8"}'
)
PLAIN = b'{"number":1}\n'
NOW = 1_760_000_000.5


def test_a_line_is_read_as_a_request() -> None:
    others = "Proxy guests stopped (cumulated conns: FE: 1, BE: 0).\n1 event dropped\n\n"
    for bad in (LINE[:-1], "{}", '{"by":"x"}'):
        others += f"{bad}\n"
    assert parse_events(f"{others}{LINE}\n") == [
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


def test_a_request_that_was_none_is_watched_without_a_method() -> None:
    bad = LINE.replace('"GET"', '"<BADREQ>"').replace('"\\/latest\\/user-data"', '"-"')
    (found,) = parse_events(bad.replace('"vm-1"', '"!"').replace('"ms":3', '"ms":-1'))
    assert (found.method, found.path, found.instance, found.milliseconds) == ("", "", None, 0)


_SERVED = {
    AnsweredBy.CACHE: "guests/<CACHE> documents/<CACHE> guests/<NOSRV> agents/<NOSRV>",
    AnsweredBy.DOCUMENTS: "documents/documents-1 documents/<NOSRV> documents.checked/<NOSRV>",
    AnsweredBy.NOVA: "nova.default/192.0.2.1:8775 nova.default.once/192.0.2.1:8775",
    AnsweredBy.RESOLVER: "resolver/resolver",
    AnsweredBy.CONFLICT: "conflict/<NOSRV>",
}


@pytest.mark.parametrize(
    ("served", "by"), [(one, by) for by, served in _SERVED.items() for one in served.split()]
)
def test_backend_and_server_name_who_answered(served: str, by: AnsweredBy) -> None:
    (found,) = parse_events(LINE.replace("documents/documents-0", served))
    assert found.answered_by is by
    refused = LINE.replace("documents/documents-0", "guests/<NOSRV>").replace("200", "400")
    assert parse_events(refused)[0].answered_by is AnsweredBy.HAPROXY


def test_what_haproxy_has_left_out_is_told_and_what_it_says_of_itself_is_not() -> None:
    text = PLAIN + b"1234 events dropped\0\n1 event dropped\0\nProxy guests stopped (x).\n" + PLAIN
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
