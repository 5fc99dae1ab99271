"""Lines of the audit log and of `watch`, as HAProxy's real rules write them without a daemon: JSON, and no secret."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from typing import Any, Final

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from imdsproxy.core.haproxy.request_log import (
    WATCH_RING,
    AnsweredBy,
    Watched,
    parse_events,
    read_audit,
)
from imdsproxy.core.policy import Policy, TokenMode
from support.access_table import META, TOKEN, USER_DATA
from support.guest import Lost
from support.haproxy_alone import KEY, WAYS, Alone, open_alone
from support.hostile import Harm, harms
from support.lab import until

pytestmark = pytest.mark.root

_SECRET: Final = "q7hQwAlphaOmega"
_ODD: Final = st.binary(max_size=60).map(lambda sent: sent.translate(None, b"\0\r\n"))


@pytest.fixture(scope="module", params=["documents", "nova"])
def opened(request: pytest.FixtureRequest) -> Iterator[Alone]:
    with open_alone(nova=request.param == "nova", audit=1) as alone:
        yield alone


@pytest.fixture
def audited(opened: Alone) -> Alone:
    opened.renew()
    return opened


@pytest.fixture(scope="module")
def watched() -> Iterator[Alone]:
    with open_alone(watched=True) as alone:
        alone.renew()
        yield alone


def _text(alone: Alone) -> str:
    """What the controller would write into the audit log."""
    raw = alone.command("show events audit").encode("utf-8", "surrogateescape")
    return read_audit(raw, time.time()).text.decode()


def _lines(alone: Alone) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _text(alone).splitlines()]


def _line(alone: Alone, agent: str) -> dict[str, Any]:
    """The last one of a request with this `User-Agent`."""
    until(lambda: any(one["agent"] == agent for one in _lines(alone)), what=f"a line of {agent}")
    return [one for one in _lines(alone) if one["agent"] == agent][-1]


def _send(alone: Alone, data: bytes) -> None:
    """Send a guest's bytes, and wait a moment for an answer."""
    place = ("127.0.0.1", alone.ports["red"])
    with contextlib.suppress(OSError), socket.create_connection(place, 0.3) as connection:
        connection.sendall(data)
        connection.recv(65_536)


@pytest.mark.parametrize("way", WAYS)
def test_a_line_has_who_asked_what_and_what_became_of_it(audited: Alone, way: str) -> None:
    begun = time.time()
    agent = f"Cloud-Init/24.1 {way}"
    audited.ask(f"{USER_DATA}?a=b", way=way, headers=(f"User-Agent: {agent}",), kept=False)
    line = _line(audited, agent)
    assert begun - 1 <= line.pop("time") <= time.time() + 1
    assert line.pop("number") > 0
    assert line.pop("ms") >= 0
    backend = "nova.default/" if audited.nova else "documents/"
    assert line.pop("by").startswith(backend)
    assert line == {
        "network": "red",
        "address": "127.0.0.1",
        "instance": "i-red",
        "method": "GET",
        "path": USER_DATA,
        "status": 200,
        "token": "no",
        "refused": "-",
        "agent": agent,
    }


def test_tokens_are_a_word_in_connections_that_are_kept_too(audited: Alone) -> None:
    token = audited.token(expires_at=int(time.time()) + 60)
    header = "X-aws-ec2-metadata-token: "
    for agent, sent, word in (
        ("good", token, ("yes", "-", 200)),
        ("again", token, ("yes", "-", 200)),
        ("bad", _SECRET, ("bad", "token", 401)),
    ):
        audited.ask(USER_DATA, headers=(header + sent, f"User-Agent: {agent}"))
        line = _line(audited, agent)
        assert (line["token"], line["refused"], line["status"]) == word


_REQUIRED: Final = Policy(tokens=TokenMode.REQUIRED)


@pytest.mark.parametrize(
    ("policy", "request_line", "status", "refused"),
    [
        (_REQUIRED, f"GET {USER_DATA}", 401, "token-required"),
        (Policy(endpoint=False), f"GET {USER_DATA}", 403, "endpoint"),
        (Policy(refuse_forwarded=True), f"GET {META}", 403, "forwarded"),
        (_REQUIRED, "GET /latest/../x", 400, "path"),
        (_REQUIRED, f"PUT {TOKEN}", 400, "token-request"),
    ],
)
def test_the_rule_that_refuses_is_named(
    audited: Alone, policy: Policy, request_line: str, status: int, refused: str
) -> None:
    audited.have(policy)
    method, path = request_line.split()
    headers = (f"User-Agent: {refused}", *(("Via: a",) if policy.refuse_forwarded else ()))
    assert audited.ask(path, method=method, headers=headers).status == status
    line = _line(audited, refused)
    assert (line["refused"], line["status"]) == (refused, status)


def test_no_token_signature_key_or_query_is_in_a_line_wherever_a_guest_puts_it(
    audited: Alone,
) -> None:
    token = audited.token(expires_at=int(time.time()) + 600)
    header = f"X-aws-ec2-metadata-token: {token}"
    ways: tuple[tuple[str, tuple[str, ...]], ...] = (
        (USER_DATA, (header,)),
        (USER_DATA, (header, header)),
        (USER_DATA, (f"User-Agent: curl {token}",)),
        (USER_DATA, (f"User-Agent: {'x' * 150}{token}",)),
        (USER_DATA, (f"Authorization: Bearer {token}", f"Cookie: t={token}")),
        (USER_DATA, (f"X-aws-ec2-metadata-token-ttl-seconds: {token}",)),
        (f"{TOKEN}/{token}", ()),
        (f"/{token}", (header,)),
        (f"{USER_DATA}?{_SECRET}={token}", ()),
        (f"http://{token}{USER_DATA}?{_SECRET}", ()),
        (f"{USER_DATA}%3f/?{_SECRET}#{_SECRET}", ()),
        (f"/??{_SECRET}?{_SECRET}", ()),
    )
    for way in WAYS:
        for target, headers in ways:
            with contextlib.suppress(Lost):
                audited.ask(target, way=way, headers=headers)
    audited.ask(USER_DATA, headers=("User-Agent: the last",))
    _line(audited, "the last")
    text = _text(audited)
    secret = (_SECRET, KEY.text, token, token.rpartition(".")[2], "a" * 64)
    assert not [word for word in secret if word in text]
    assert any(one["path"] == f"{TOKEN}/(token)" for one in _lines(audited))


def test_every_line_is_json_whatever_a_guest_sends(audited: Alone) -> None:
    @settings(max_examples=60, deadline=None, phases=[Phase.generate])
    @given(harm=harms(), odd=_ODD)
    def send(harm: Harm, odd: bytes) -> None:
        for data in (
            harm.data_with("t"),
            b"GET /" + odd.replace(b" ", b"") + b" HTTP/1.1\r\nHost: x\r\n\r\n",
            b"GET /odd HTTP/1.1\r\nHost: x\r\nUser-Agent: " + odd + b"\r\n\r\n",
        ):
            _send(audited, data)

    send()
    odd = bytes(range(1, 256)).translate(None, b"\r\n")
    agents = (
        b'"}\\',
        b"a\tb",
        b"\xff\xfe",
        b"\xc3",
        odd,
        b"%[var(x)]%ST",
        b'\\"' * 2000,
        b"\1" * 300,
    )
    targets = (
        b'/a"b\\c', b"/" + b"z" * 8000, b"/" + b'"' * 2000, b"/" + b"\\" * 1010, b"/\xff", b"/a\tb", b"/{}|#%00%22",
        b"http://h/p?q", b"*", b"//", b"/?", b"?",
    )  # fmt: skip
    raw = [b"GET /one HTTP/1.1\r\nHost: x\r\nUser-Agent: " + agent for agent in agents]
    raw += [b"GET " + target + b" HTTP/1.1\r\nHost: x" for target in targets]
    raw += [
        b'A"B / HTTP/1.1\r\nHost: x',
        b"\x16\x03\x01\x02",
        b"G" * 1500 + b" / HTTP/1.1\r\nHost: x",
    ]
    for mark in ("first", "last"):
        audited.ask(f"/{mark}", headers=(f"User-Agent: {mark}",))
        _line(audited, mark)
        for request in raw if mark == "first" else ():
            _send(audited, request + b"\r\nConnection: close\r\n\r\n")
    lines = _lines(audited)
    paths = [line["path"] for line in lines]
    assert paths.index("/last") - paths.index("/first") == len(raw) + 1
    assert all(one.keys() == lines[0].keys() for one in lines)
    assert '/a"b\\c' in paths
    assert "a\tb" in {one["agent"] for one in lines}
    assert max(map(len, paths)) > 1000
    assert max(map(len, _text(audited).splitlines())) < 4096


def _seen(alone: Alone) -> list[Watched]:
    return parse_events(alone.command(f"show events {WATCH_RING}"))


@pytest.mark.parametrize("way", ["guests", "agents"])
def test_who_watches_sees_path_and_answer_and_nothing_that_may_be_secret(
    watched: Alone, way: str
) -> None:
    token = (f"X-Aws-Ec2-Metadata-Token: {_SECRET}", f"User-Agent: {_SECRET}")
    for target, host in ((f"/{way}/a?{_SECRET}", "x"), (f"http://{_SECRET}/{way}/b", _SECRET)):
        watched.ask(target, way=way, host=host, headers=token)
    watched.ask(f"/{way}/kept", way=way)
    watched.ask(f"/{way}/kept", way=way)
    until(lambda: [one.path for one in _seen(watched)].count(f"/{way}/kept") == 2)
    found = [one for one in _seen(watched) if one.path.startswith(f"/{way}/")]
    assert [one.path.rpartition("/")[2] for one in found] == ["a", "b", "kept", "kept"]
    assert {(one.network, one.address, one.method) for one in found} == {
        ("red", "127.0.0.1", "GET")
    }
    assert [one.answered_by for one in found[2:]] == [AnsweredBy.DOCUMENTS, AnsweredBy.CACHE]
    assert [one.instance for one in found[2:]] == ["i-red", "i-red"]
    assert _SECRET not in watched.command(f"show events {WATCH_RING}")


def test_a_connection_without_a_request_has_no_line(watched: Alone) -> None:
    for _ in range(5):
        watched.connect().close()
    with watched.connect() as connection:
        connection.send(b"no request\r\n\r\n")
    until(lambda: [(one.status, one.method) for one in _seen(watched)].count((400, "")) == 1)
    assert len([one for one in _seen(watched) if one.status == 400]) == 1
