"""Reads without a token, as HAProxy counts them by its real rules and no daemon: which, how many, and by whom."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from typing import Final

import pytest

from imdsproxy.core.haproxy.counting import (
    GUESTS_TABLE,
    ONE_IN,
    READERS_TABLE,
    CountedRow,
    parse_guests,
    parse_readers,
)
from imdsproxy.core.policy import Policy, TokenMode
from imdsproxy.core.wire import HEADER_OPERATOR
from support.access_table import META, TOKEN, USER_DATA
from support.guest import Lost
from support.haproxy_alone import WAYS, Alone, open_alone

pytestmark = pytest.mark.root

_HARMLESS: Final = re.compile(r"[\w./+:;#()-]*", re.ASCII)
_REQUIRED: Final = Policy(tokens=TokenMode.REQUIRED, openstack_tokens=TokenMode.REQUIRED)


@pytest.fixture(scope="module", params=["documents", "nova"])
def opened(request: pytest.FixtureRequest) -> Iterator[Alone]:
    with open_alone(nova=request.param == "nova", count_reads=1) as alone:
        yield alone


@pytest.fixture
def alone(opened: Alone) -> Alone:
    opened.renew()
    for table in (GUESTS_TABLE, READERS_TABLE):
        opened.command(f"clear table {table}")
    return opened


def _counts(alone: Alone) -> tuple[int, int]:
    """Reads of red's guest, and how many were refused."""
    rows = {one.key: one for one in parse_guests(alone.command(f"show table {GUESTS_TABLE}"))}
    assert {key for key in rows if key[0] == "red"} <= {("red", "i-red")}
    row = rows.get(("red", "i-red"), CountedRow((), 0, 0, 0))
    return row.reads, row.refused


def _readers(alone: Alone, network: str = "red") -> list[tuple[str, str]]:
    """Path and client of each."""
    rows = parse_readers(alone.command(f"show table {READERS_TABLE}"))
    return [
        (path, client) for found, _, path, client in (one.key for one in rows) if found == network
    ]


@pytest.mark.parametrize("way", WAYS)
def test_each_read_without_a_token_is_counted_and_nothing_else(alone: Alone, way: str) -> None:
    token = f"X-aws-ec2-metadata-token: {alone.token(expires_at=int(time.time()) + 60)}"
    for policy, reads in (
        (Policy(), (1, 0)),
        (Policy(refuse_forwarded=True), (1, 0)),
        (Policy(tokens=TokenMode.OFF), (1, 0)),
        (_REQUIRED, (0, 1)),
    ):
        alone.have(policy)
        before = _counts(alone)
        # With a token, of other trees, of the token's own route, of no known method.
        alone.ask("/nocloud/user-data", way=way)
        if policy.tokens is not TokenMode.OFF:
            alone.ask(USER_DATA, way=way, headers=(token,))
            alone.ask(META, way=way, headers=(token,))
        alone.ask(TOKEN, way=way)
        alone.ask(USER_DATA, way=way, method="POST")
        assert _counts(alone) == before, policy
        for _ in range(10):
            alone.ask(USER_DATA, way=way)
        if policy is _REQUIRED:
            alone.ask(META, way=way)
        expected = [10 * one + (policy is _REQUIRED and one) for one in reads]
        assert _counts(alone) == tuple(a + b for a, b in zip(before, expected, strict=True)), policy


def test_an_operators_request_is_no_read_of_the_guest(alone: Alone) -> None:
    for policy in (Policy(), _REQUIRED):
        alone.have(policy)
        alone.ask(USER_DATA, way="found", headers=(f"{HEADER_OPERATOR}: yes",))
    assert _counts(alone) == (0, 0)


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
        for _ in range(3):
            assert alone.ask(USER_DATA).status == 200
        alone.have(_REQUIRED)
        for _ in range(3):
            assert alone.ask(USER_DATA).status == 401
        assert _counts(alone) == (0, 3)


@pytest.mark.parametrize(
    "client",
    [
        b"\"quoted\" 'and' `not`",
        b"back\\slash|pipe|pipe key=x use=1 exp=1 gpc0=99999",
        b"\x1b[31mred\x1b]0;title\x07\x9b2J\xff\xfe",
        b"[bold]markup[/bold] {}%[src] $HOME <b>",
        b"tab\there",
        "snow☃man".encode(),
        b"A" * 10_000,
    ],
)
def test_a_client_of_a_hostile_name_is_cut_and_harmless(alone: Alone, client: bytes) -> None:
    head = (
        b'GET /latest/%%0a%%1b[31m/"x|y HTTP/1.1\r\nHost: 169.254.169.254\r\nUser-Agent: %s\r\n\r\n'
    )
    with alone.connect() as connection:
        connection.send(head % client)
        assert connection.read().status == 200
    assert _counts(alone) == (1, 0)
    ((path, shown),) = _readers(alone)
    assert (len(path) <= 48, len(shown) <= 64) == (True, True)
    assert _HARMLESS.fullmatch(path + shown)
    assert path.startswith("latest/_0a_1b_31m/")


@pytest.mark.parametrize("client", [b"A" * 200_000, b"line\r\n break", b"line\nX-Injected: yes"])
def test_a_client_that_is_no_header_harms_nothing(alone: Alone, client: bytes) -> None:
    head = b"GET /latest/ HTTP/1.1\r\nHost: 169.254.169.254\r\nUser-Agent: %s\r\n\r\n"
    with alone.connect() as connection, contextlib.suppress(Lost):  # cut off while it still sends
        connection.send(head % client)
        connection.read()
    assert alone.ask(USER_DATA).status == 200
    assert all(_HARMLESS.fullmatch(shown) for _, shown in _readers(alone))


def test_one_guest_with_ever_new_names_does_not_drive_out_the_others(alone: Alone) -> None:
    alone.ask(USER_DATA, "green", headers=("User-Agent: lonely",))
    for number in range(200):
        alone.ask("/latest/", headers=(f"User-Agent: flood-{number}",))
    assert len(_readers(alone)) <= 70
    assert [shown for _, shown in _readers(alone, "green")] == ["lonely"]
