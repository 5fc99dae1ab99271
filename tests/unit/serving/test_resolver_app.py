from __future__ import annotations

import asyncio
import time
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from ipaddress import ip_address

import pytest

from imdsproxy.config.schema import ResolverSettings
from imdsproxy.core.identity import Denial
from imdsproxy.core.model import InstanceId, Scope
from imdsproxy.core.observation import AddressKey
from imdsproxy.core.wire import MISMATCH_TEXT, UNKNOWN_TEXT, EmbeddedRecord, MapRecord
from imdsproxy.serving.http import Send, while_there
from imdsproxy.serving.resolver import Outcome, Resolver
from imdsproxy.serving.resolver_app import CollectedAnswer, GuestRequest, resolver_app

_SCOPE_HEADERS = [(b"x-imdsproxy-network", b"red"), (b"x-imdsproxy-address", b"10.0.0.5")]
_SCOPE = {"type": "http", "method": "POST", "raw_path": b"/password", "headers": _SCOPE_HEADERS}


@dataclass
class Forwarded:
    requests: list[GuestRequest] = field(default_factory=list)

    async def forward(self, _: MapRecord, request: GuestRequest, send: Send) -> None:
        self.requests.append(request)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


@dataclass
class Client:
    """Sends a body, and goes away when `gone` is set."""

    gone: asyncio.Event = field(default_factory=asyncio.Event)
    sent: bool = False

    async def receive(self) -> MutableMapping[str, object]:
        if not self.sent:
            self.sent = True
            return {"type": "http.request", "body": b"pass", "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}


@dataclass
class Look:
    """Knows who it is when `known` is set."""

    known: asyncio.Event = field(default_factory=asyncio.Event)
    asked: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, key: AddressKey, scope: Scope | None, port: int | None, /) -> Outcome:
        del port
        del key, scope
        self.asked.set()
        await self.known.wait()
        return EmbeddedRecord(InstanceId("web"), "0" * 16)


async def test_what_a_guest_asked_that_went_away_meanwhile_is_not_sent_on() -> None:
    """HAProxy has told it to come again: a password would arrive twice."""
    client, look, forwarded, answer = Client(), Look(), Forwarded(), CollectedAnswer()
    resolver = Resolver(look, ResolverSettings, time.monotonic)
    app = resolver_app(resolver, forwarded.forward)
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:

        async def ask() -> None:
            await app(_SCOPE, client.receive, answer.take)

        group.create_task(ask())
        await look.asked.wait()
        client.gone.set()
    look.known.set()
    assert not forwarded.requests
    assert not answer.status


async def test_what_a_guest_asked_that_is_still_there_is_sent_in_its_networks_name() -> None:
    client, look, forwarded, answer = Client(), Look(), Forwarded(), CollectedAnswer()
    look.known.set()
    app = resolver_app(Resolver(look, ResolverSettings, time.monotonic), forwarded.forward)
    async with asyncio.timeout(30):
        await app(_SCOPE, client.receive, answer.take)
    (request,) = forwarded.requests
    assert (request.key, request.body) == (("red", ip_address("10.0.0.5")), b"pass")
    assert answer.status == 200


@pytest.mark.parametrize(
    ("denial", "method", "status", "body"),
    [
        (Denial.UNKNOWN, "GET", 404, UNKNOWN_TEXT),
        (Denial.UNKNOWN, "HEAD", 404, ""),
        # Some clients take any body for a token.
        (Denial.UNKNOWN, "PUT", 404, ""),
        (Denial.MISMATCH, "GET", 403, MISMATCH_TEXT),
        (Denial.MISMATCH, "PUT", 403, ""),
        *(
            (one, "GET", 503, "")
            for one in (Denial.CONFLICT, Denial.UNAVAILABLE, Denial.OVER_LIMIT)
        ),
    ],
)
@pytest.mark.parametrize("verified", [True, False])
async def test_a_denial_is_answered_in_one_line_or_none(
    denial: Denial, method: str, status: int, body: str, *, verified: bool
) -> None:
    async def look(_key: AddressKey, _scope: Scope | None, _port: int | None, /) -> Outcome:
        return denial

    forwarded, answer = Forwarded(), CollectedAnswer()
    settings = ResolverSettings(hold_s=0)
    app = resolver_app(Resolver(look, lambda: settings, time.monotonic), forwarded.forward)
    headers = list(_SCOPE_HEADERS)
    if not verified:
        headers.append((b"x-imdsproxy-unverified", b"4711"))
    await app({**_SCOPE, "method": method, "headers": headers}, Client().receive, answer.take)
    found = dict(answer.headers)
    assert (answer.status, answer.body.decode()) == (status, body)
    assert found[b"content-length"] == (b"44" if method == "HEAD" else b"%d" % len(body))
    assert found.get(b"content-type") == (b"text/plain" if body or method == "HEAD" else None)
    assert (b"retry-after" in found) == (status == 503)
    # Only what holds nothing of an instance may be read by any MAC.
    assert (b"x-imdsproxy-refused" in found) == (not verified)
    assert not forwarded.requests


@pytest.mark.parametrize(("method", "status"), [("GET", 200), ("PUT", 200), ("POST", 503)])
async def test_an_unverified_request_that_changes_something_is_to_come_again(
    method: str, status: int
) -> None:
    look, forwarded, answer = Look(), Forwarded(), CollectedAnswer()
    look.known.set()
    app = resolver_app(Resolver(look, ResolverSettings, time.monotonic), forwarded.forward)
    headers = [*_SCOPE_HEADERS, (b"x-imdsproxy-unverified", b"4711")]
    await app({**_SCOPE, "method": method, "headers": headers}, Client().receive, answer.take)
    assert (answer.status, len(forwarded.requests)) == (status, int(status == 200))


async def test_what_goes_wrong_is_not_kept_quiet() -> None:
    async def fail() -> None:
        raise ValueError("a fault")

    with pytest.raises(ValueError, match="a fault"):
        await while_there(Client(sent=True).receive, fail())


@pytest.mark.parametrize("name", ["network", "address", "target", "scope", "unverified"])
async def test_what_is_said_twice_of_who_asks_is_400(name: str) -> None:
    """HAProxy says each once, so one of the two is not HAProxy's."""
    look, forwarded, answer = Look(), Forwarded(), CollectedAnswer()
    look.known.set()
    app = resolver_app(Resolver(look, ResolverSettings, time.monotonic), forwarded.forward)
    told = [*_SCOPE_HEADERS, (f"x-imdsproxy-{name}".encode(), b"1")]
    twice = told if name in ("network", "address") else [*told, told[-1]]
    await app({**_SCOPE, "headers": twice}, Client().receive, answer.take)
    assert answer.status == 400
    assert not forwarded.requests


@pytest.mark.parametrize(
    "headers",
    [
        [(b"x-imdsproxy-network", b"red"), (b"x-imdsproxy-address", b"\xff")],
        [*_SCOPE_HEADERS, (b"x-imdsproxy-scope", b"nonsense")],
        [*_SCOPE_HEADERS, (b"x-imdsproxy-unverified", b"x")],
    ],
)
async def test_what_haproxy_would_never_say_is_400(headers: list[tuple[bytes, bytes]]) -> None:
    answer = CollectedAnswer()
    app = resolver_app(Resolver(Look(), ResolverSettings, time.monotonic), Forwarded().forward)
    await app({**_SCOPE, "headers": headers}, Client().receive, answer.take)
    assert answer.status == 400
