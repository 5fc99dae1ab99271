"""What HAProxy reports of requests, by its real rules and no daemon: lines of the audit log and of `watch`, and counts.

Lines are JSON, and no secret is in them; counted are reads without a token.
"""

import contextlib
import json
import re
import socket
import time
from collections.abc import Iterator
from typing import Any, Final

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from imdsproxy.haproxy.rules.counting import (
    GUESTS_TABLE,
    READERS_TABLE,
    CountedRow,
    parse_guests,
    parse_readers,
)
from imdsproxy.haproxy.rules.request_log import (
    WATCH_RING,
    AnsweredBy,
    Watched,
    parse_events,
    read_audit,
)
from imdsproxy.model.policy import Policy, TokenMode
from imdsproxy.model.wire import HEADER_AUDITED, HEADER_OPERATOR, ONE_IN
from support.access_table import META, TOKEN, USER_DATA
from support.guest import Lost, with_token
from support.haproxy_alone import KEY, WAYS, Alone, open_alone
from support.hostile import Harm, harms
from support.lab import until

pytestmark = pytest.mark.root

_SECRET: Final = "q7hQwAlphaOmega"
_ODD: Final = st.binary(max_size=60).map(lambda sent: sent.translate(None, b"\0\r\n"))
_REQUIRED: Final = Policy(tokens=TokenMode.REQUIRED, openstack_tokens=TokenMode.REQUIRED)


@pytest.fixture(scope="module", params=["documents", "nova"])
def opened(request: pytest.FixtureRequest) -> Iterator[Alone]:
    with open_alone(nova=request.param == "nova", audit=1, count_reads=1) as alone:
        yield alone


@pytest.fixture
def alone(opened: Alone) -> Alone:
    opened.renew()
    for table in (GUESTS_TABLE, READERS_TABLE):
        opened.command(f"clear table {table}")
    return opened


# The audit log


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
def test_a_line_has_who_asked_what_and_what_became_of_it(alone: Alone, way: str) -> None:
    begun = time.time()
    agent = f"Cloud-Init/24.1 {way}"
    reply = alone.ask(f"{USER_DATA}?a=b", way=way, headers=(f"User-Agent: {agent}",), kept=False)
    # What the resolver sends on has its line here, and no second one where it came from.
    assert reply.headers.get(HEADER_AUDITED) == ("yes" if way == "found" else None)
    line = _line(alone, agent)
    assert begun - 1 <= line.pop("time") <= time.time() + 1
    assert line.pop("number") > 0
    assert line.pop("ms") >= 0
    assert line.pop("by").startswith("nova.default" if alone.nova else "documents")
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
    alone: Alone, policy: Policy, request_line: str, status: int, refused: str
) -> None:
    alone.have(policy)
    method, path = request_line.split()
    headers = (f"User-Agent: {refused}", *(("Via: a",) if policy.refuse_forwarded else ()))
    assert alone.ask(path, method=method, headers=headers).status == status
    line = _line(alone, refused)
    assert (line["refused"], line["status"]) == (refused, status)


def test_no_token_signature_key_or_query_is_in_a_line_wherever_a_guest_puts_it(
    alone: Alone,
) -> None:
    token = alone.token(expires_at=int(time.time()) + 600)
    # That there was one is a word, in connections that are kept too.
    for agent, sent, word in (
        ("good", token, ("yes", "-", 200)),
        ("again", token, ("yes", "-", 200)),
        ("bad", _SECRET, ("bad", "token", 401)),
    ):
        alone.ask(USER_DATA, headers=(*with_token(sent), f"User-Agent: {agent}"))
        line = _line(alone, agent)
        assert (line["token"], line["refused"], line["status"]) == word
    header = with_token(token)
    ways: tuple[tuple[str, tuple[str, ...]], ...] = (
        (USER_DATA, header * 2),
        (USER_DATA, (f"User-Agent: curl {token}",)),
        (USER_DATA, (f"User-Agent: {'x' * 150}{token}",)),
        (USER_DATA, (f"Authorization: Bearer {token}", f"Cookie: t={token}")),
        (USER_DATA, (f"X-aws-ec2-metadata-token-ttl-seconds: {token}",)),
        (f"{TOKEN}/{token}", ()),
        (f"/{token}", header),
        (f"{USER_DATA}?{_SECRET}={token}", ()),
        (f"http://{token}{USER_DATA}?{_SECRET}", ()),
        (f"{USER_DATA}%3f/?{_SECRET}#{_SECRET}", ()),
        (f"/??{_SECRET}?{_SECRET}", ()),
    )
    for way in WAYS:
        for target, headers in ways:
            with contextlib.suppress(Lost):
                alone.ask(target, way=way, headers=headers)
    alone.ask(USER_DATA, headers=("User-Agent: the last",))
    _line(alone, "the last")
    text = _text(alone)
    secret = (_SECRET, KEY.text, token, token.rpartition(".")[2], "a" * 64)
    assert not [word for word in secret if word in text]
    assert any(one["path"] == f"{TOKEN}/(token)" for one in _lines(alone))


_AGENTS: Final = (
    *(b'"}\\', b"a\tb", b"\xff\xfe", b"\xc3", b"%[var(x)]%ST", b'\\"' * 2000, b"\1" * 300),
    bytes(range(1, 256)).translate(None, b"\r\n"),
)
_TARGETS: Final = (
    *(b'/a"b\\c', b"/" + b"z" * 8000, b"/" + b'"' * 2000, b"/" + b"\\" * 1010, b"/\xff"),
    *(b"/a\tb", b"/{}|#%00%22", b"http://h/p?q", b"*", b"//", b"/?", b"?"),
)


def test_every_line_is_json_whatever_a_guest_sends(alone: Alone) -> None:
    @settings(max_examples=60, deadline=None, phases=[Phase.generate])
    @given(harm=harms(), odd=_ODD)
    def send(harm: Harm, odd: bytes) -> None:
        for data in (
            harm.data_with("t"),
            b"GET /" + odd.replace(b" ", b"") + b" HTTP/1.1\r\nHost: x\r\n\r\n",
            b"GET /odd HTTP/1.1\r\nHost: x\r\nUser-Agent: " + odd + b"\r\n\r\n",
        ):
            _send(alone, data)

    send()
    raw = [b"GET /one HTTP/1.1\r\nHost: x\r\nUser-Agent: " + agent for agent in _AGENTS]
    raw += [b"GET " + target + b" HTTP/1.1\r\nHost: x" for target in _TARGETS]
    raw += [b'A"B / HTTP/1.1\r\nHost: x', b"\x16\x03\x01\x02", b"G" * 1500 + b" / HTTP/1.1\r\nHost: x"]  # fmt: skip
    for mark in ("first", "last"):
        alone.ask(f"/{mark}", headers=(f"User-Agent: {mark}",))
        _line(alone, mark)
        for request in raw if mark == "first" else ():
            _send(alone, request + b"\r\nConnection: close\r\n\r\n")

    def paths() -> list[str]:
        return [line["path"] for line in _lines(alone)]

    # A path that no document has is answered a second late, so its line may follow the last one.
    wanted = len(raw) + 2
    until(lambda: len(paths()[paths().index("/first") :]) >= wanted, what="a line of each request")
    lines = _lines(alone)
    assert len(paths()[paths().index("/first") :]) == wanted
    assert all(one.keys() == lines[0].keys() for one in lines)
    assert '/a"b\\c' in paths()
    assert "a\tb" in {one["agent"] for one in lines}
    assert max(map(len, paths())) > 1000
    assert max(map(len, _text(alone).splitlines())) < 4096


# Watching


@pytest.fixture(scope="module")
def watched() -> Iterator[Alone]:
    with open_alone(watched=True) as alone:
        alone.renew()
        yield alone


def _seen(alone: Alone) -> list[Watched]:
    return parse_events(alone.command(f"show events {WATCH_RING}"))


@pytest.mark.parametrize("way", ["guests", "agents"])
def test_who_watches_sees_path_and_answer_and_nothing_that_may_be_secret(
    watched: Alone, way: str
) -> None:
    # A connection without a request has no line.
    watched.connect().close()
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
    assert not [one for one in _seen(watched) if not one.method]


# Reads without a token


def _counts(alone: Alone) -> tuple[int, int]:
    """Reads of red's guest, and how many were refused."""
    rows = {one.key: one for one in parse_guests(alone.command(f"show table {GUESTS_TABLE}"))}
    assert {key for key in rows if key[0] == "red"} <= {("red", "i-red")}
    row = rows.get(("red", "i-red"), CountedRow((), 0, 0, 0))
    return row.reads, row.refused


def _readers(alone: Alone, network: str = "red") -> list[tuple[str, str]]:
    """Path and client of each."""
    rows = parse_readers(alone.command(f"show table {READERS_TABLE}"))
    keys = (one.key for one in rows)
    return [(path, client) for found, _, path, client in keys if found == network]


@pytest.mark.parametrize("way", WAYS)
def test_each_read_without_a_token_is_counted_and_nothing_else(alone: Alone, way: str) -> None:
    token = with_token(alone.token(expires_at=int(time.time()) + 60))
    for policy, reads in (
        (Policy(), (1, 0)),
        (Policy(refuse_forwarded=True), (1, 0)),
        (Policy(tokens=TokenMode.OFF), (1, 0)),
        (_REQUIRED, (0, 1)),
    ):
        alone.have(policy)
        before = _counts(alone)
        # With a token, of other trees, of the token's own route, of no known method, of an operator.
        alone.ask("/nocloud/user-data", way=way)
        if policy.tokens is not TokenMode.OFF:
            alone.ask(USER_DATA, way=way, headers=token)
            alone.ask(META, way=way, headers=token)
        alone.ask(TOKEN, way=way)
        alone.ask(USER_DATA, way=way, method="POST")
        if way == "found":
            alone.ask(USER_DATA, way=way, headers=(f"{HEADER_OPERATOR}: yes",))
        assert _counts(alone) == before, policy
        for _ in range(10):
            alone.ask(USER_DATA, way=way)
        if policy is _REQUIRED:
            alone.ask(META, way=way)
        expected = [10 * one + (policy is _REQUIRED and one) for one in reads]
        assert _counts(alone) == tuple(a + b for a, b in zip(before, expected, strict=True)), policy


@pytest.mark.parametrize("policy", [Policy(), Policy(refuse_forwarded=True)])
def test_a_sample_shows_about_how_many_read(policy: Policy) -> None:
    with open_alone(count_reads=ONE_IN) as alone:
        alone.have(policy)
        for _ in range(2_000):
            assert alone.ask(USER_DATA).status == 200
        # Of 2,000 reads 100 are counted, give or take 10: this is six times that.
        reads, _ = _counts(alone)
        assert reads % ONE_IN == 0
        assert 800 <= reads <= 3_200


def test_only_what_is_refused_is_counted_where_nothing_else_is() -> None:
    with open_alone() as alone:
        for policy, status in ((Policy(), 200), (_REQUIRED, 401)):
            alone.have(policy)
            assert {alone.ask(USER_DATA).status for _ in range(3)} == {status}
        assert _counts(alone) == (0, 3)


@pytest.mark.parametrize(
    "client",
    [
        b"\"quoted\" 'and' `not`",
        b"back\\slash|pipe|pipe key=x use=1 exp=1 gpc0=99999",
        b"\x1b[31mred\x1b]0;title\x07\x9b2J\xff\xfe",
        b"[bold]markup[/bold] {}%[src] $HOME <b>",
        b"tab\there",
        b"A" * 10_000,
        # No header at all.
        b"A" * 200_000,
        b"line\nX-Injected: yes",
    ],
)
def test_a_client_of_a_hostile_name_is_cut_and_harmless(alone: Alone, client: bytes) -> None:
    head = b'GET /latest/%%0a%%1b[31m/"x|y HTTP/1.1\r\nHost: x\r\nUser-Agent: %s\r\n\r\n'
    with alone.connect() as connection, contextlib.suppress(Lost):  # cut off while it still sends
        connection.send(head % client)
        connection.read()
    reads, refused = _counts(alone)
    assert (reads <= 1, refused) == (True, 0)
    shown = _readers(alone)
    assert len(shown) == reads == (len(client) < 200_000)
    for path, name in shown:
        assert (len(path) <= 48, len(name) <= 64) == (True, True)
        assert re.fullmatch(r"[\w./+:;#()-]*", path + name, re.ASCII)
        assert path.startswith("latest/_0a_1b_31m/")


def test_one_guest_with_ever_new_names_does_not_drive_out_the_others(alone: Alone) -> None:
    alone.ask(USER_DATA, "green", headers=("User-Agent: lonely",))
    for number in range(200):
        alone.ask("/latest/", headers=(f"User-Agent: flood-{number}",))
    assert len(_readers(alone)) <= 70
    assert [shown for _, shown in _readers(alone, "green")] == ["lonely"]
