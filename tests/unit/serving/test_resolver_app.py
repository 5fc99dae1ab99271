from __future__ import annotations

import asyncio
import time
from collections.abc import MutableMapping
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


_WEB = EmbeddedRecord(InstanceId("web"), "0" * 16)
_UNVERIFIED = (b"x-imdsproxy-unverified", b"4711")


class Rig:
    """A guest that asks the application, and what becomes of its request.

    Attributes:
        outcome: What the look-up finds, when `known` is set.
        gone: When the guest goes away.
        forwarded: Requests that were handed to HAProxy.
    """

    def __init__(self, outcome: Outcome = _WEB) -> None:
        self.outcome = outcome
        self.known, self.asked, self.gone = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.known.set()
        self.forwarded: list[GuestRequest] = []
        self._sent = False
        settings = ResolverSettings(hold_s=0)
        resolver = Resolver(self._look, lambda: settings, time.monotonic)
        self._app = resolver_app(resolver, self._forward)

    async def _look(self, _key: AddressKey, _scope: Scope | None, _port: int | None, /) -> Outcome:
        self.asked.set()
        await self.known.wait()
        return self.outcome

    async def _forward(self, _: MapRecord, request: GuestRequest, send: Send) -> None:
        self.forwarded.append(request)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def receive(self) -> MutableMapping[str, object]:
        if not self._sent:
            self._sent = True
            return {"type": "http.request", "body": b"pass", "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def ask(
        self, *more: tuple[bytes, bytes], method: str = "POST", base: bool = True
    ) -> CollectedAnswer:
        answer = CollectedAnswer()
        headers = [*(_SCOPE_HEADERS if base else ()), *more]
        scope = {**_SCOPE, "method": method, "headers": headers}
        async with asyncio.timeout(30):
            await self._app(scope, self.receive, answer.take)
        return answer


async def test_what_a_guest_asked_that_went_away_meanwhile_is_not_sent_on() -> None:
    """HAProxy has told it to come again: a password would arrive twice."""
    rig = Rig()
    rig.known.clear()
    asking = asyncio.create_task(rig.ask())
    await rig.asked.wait()
    rig.gone.set()
    assert not (await asking).status
    assert not rig.forwarded


async def test_what_a_guest_asked_that_is_still_there_is_sent_in_its_networks_name() -> None:
    rig = Rig()
    assert (await rig.ask()).status == 200
    (request,) = rig.forwarded
    assert (request.key, request.body) == (("red", ip_address("10.0.0.5")), b"pass")


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
    rig = Rig(denial)
    answer = await rig.ask(*([] if verified else [_UNVERIFIED]), method=method)
    found = dict(answer.headers)
    assert (answer.status, answer.body.decode()) == (status, body)
    assert found[b"content-length"] == (b"44" if method == "HEAD" else b"%d" % len(body))
    assert found.get(b"content-type") == (b"text/plain" if body or method == "HEAD" else None)
    assert (b"retry-after" in found) == (status == 503)
    # Only what holds nothing of an instance may be read by any MAC.
    assert (b"x-imdsproxy-refused" in found) == (not verified)
    assert not rig.forwarded


@pytest.mark.parametrize(("method", "status"), [("GET", 200), ("PUT", 200), ("POST", 503)])
async def test_an_unverified_request_that_changes_something_is_to_come_again(
    method: str, status: int
) -> None:
    rig = Rig()
    answer = await rig.ask(_UNVERIFIED, method=method)
    assert (answer.status, len(rig.forwarded)) == (status, int(status == 200))


async def test_what_goes_wrong_is_not_kept_quiet() -> None:
    async def fail() -> None:
        raise ValueError("a fault")

    rig = Rig()
    await rig.receive()
    with pytest.raises(ValueError, match="a fault"):
        await while_there(rig.receive, fail())


@pytest.mark.parametrize(
    "headers",
    [
        # Said twice, one of the two is not HAProxy's.
        *(
            [*_SCOPE_HEADERS, *[(f"x-imdsproxy-{name}".encode(), b"1")] * count]
            for name, count in (("network", 1), ("address", 1), ("target", 2), ("scope", 2))
        ),
        [*_SCOPE_HEADERS, _UNVERIFIED, _UNVERIFIED],
        [_SCOPE_HEADERS[0], (b"x-imdsproxy-address", b"\xff")],
        [*_SCOPE_HEADERS, (b"x-imdsproxy-scope", b"nonsense")],
        [*_SCOPE_HEADERS, (b"x-imdsproxy-unverified", b"x")],
    ],
)
async def test_what_haproxy_would_never_say_of_who_asks_is_400(
    headers: list[tuple[bytes, bytes]],
) -> None:
    rig = Rig()
    assert (await rig.ask(*headers, base=False)).status == 400
    assert not rig.forwarded
