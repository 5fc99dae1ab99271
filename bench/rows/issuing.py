"""Identity tokens of a fleet: a guest's first token through a hub, signatures, and the renewals of many guests."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPSConnection
from pathlib import Path
from typing import Any, Final

from bench.context import Bench
from bench.figures import Bar, Row, judge, median, percentile
from bench.fleet import GUESTS, Cost, Fleet, open_fleet
from bench.guest import Guest
from bench.hosts import host_name, instance_name, network_of
from bench.issuer import AUDIENCES, HubSigner, open_session, request_token
from bench.lab import guest, network_name
from bench.place import BenchError
from bench.procs import cpu_seconds, pin, wait_until
from imdsproxy.fleet.members import IDENTITY_PATH
from imdsproxy.issuer.claims import Placement
from imdsproxy.issuer.exchange import MOST_AT_ONCE, TokenRequest, parse_answer, render_request
from imdsproxy.issuer.holder import EARLIEST, LATEST
from imdsproxy.issuer.local_signer import SignerClient
from imdsproxy.issuer.ring import KeyRing
from imdsproxy.model.entities import InstanceId, NetworkId
from imdsproxy.model.subject import Subject

__all__ = ["ROWS", "measure_issuing"]

ROWS: Final = ("identity-sign", "identity-first", "identity-renewals")
_SIGN_BAR: Final = Bar("≥ 1,000 a second", at_least=1000.0)
_FIRST_P50_MS, _FIRST_P99_MS = 10.0, 50.0
_FIRST_BAR: Final = Bar("p50 ≤ 10 ms, p99 ≤ 50 ms", at_most=1.0)
_RENEWALS_BAR: Final = Bar("≤ 10 % of a processor", at_most=10.0)
_GUESTS: Final = 100_000
_LIVES_S: Final = (3600, 600)
"""Lives of tokens: the longest, which the bar is for, and the default."""

_PAUSE_S: Final = 0.02
_WAIT_S: Final = 30.0
_PARTS_OF_AN_ADDRESS: Final = 250
_OK: Final = 200


def measure_issuing(bench: Bench, wanted: Callable[[str], bool]) -> Iterator[Row]:
    """Measure all rows."""
    if wanted("identity-sign"):
        yield _sign_row(bench)
    if wanted("identity-first") or wanted("identity-renewals"):
        with open_fleet(bench, signs=True) as fleet:
            if wanted("identity-renewals"):
                yield _renewals_row(fleet)
            if wanted("identity-first"):
                yield _first_row(fleet)


# Signatures


def _sign_row(bench: Bench) -> Row:
    rates = {algorithm: asyncio.run(_sign(bench, algorithm)) for algorithm in ("RS256", "ES256")}
    value = rates["RS256"]
    return Row(
        key="identity-sign",
        what="tokens that a signer signs a second, on one processor",
        figure=f"RS256 {value:,.0f}, ES256 {rates['ES256']:,.0f} a second of its processor time",
        verdict=judge(value, _SIGN_BAR),
        bar=_SIGN_BAR.text,
        value=value,
        how=(
            f"the signer of a hub, bound to one processor, which gets {MOST_AT_ONCE} requests at once for "
            f"{bench.scale.seconds:g} s"
        ),
        data={"tokens_per_s": rates},
    )


async def _sign(bench: Bench, algorithm: str) -> float:
    """Return the tokens for a second of a signer's processor time."""
    signer = HubSigner(bench.directory / f"signer-{algorithm}", algorithm)
    config = bench.directory / f"signer-{algorithm}.yaml"
    config.write_text(json.dumps({**signer.settings(), "hub": {"user": None}}))
    signer.start(config, signer)
    client = SignerClient(signer.socket)
    try:
        await _make_key(client)
        pin(signer.pid, {bench.cpus[0]})
        subject = Subject(
            InstanceId(uuid.uuid4().hex), NetworkId("blue"), uuid.uuid4().hex, audiences=AUDIENCES
        )
        request = TokenRequest(subject, AUDIENCES[0], placement=Placement.FLEET)
        lines = [render_request(request)] * MOST_AT_ONCE
        signed, spent = 0, cpu_seconds(signer.pid)
        end = time.monotonic() + bench.scale.seconds
        while time.monotonic() < end:
            answers = await client.send(lines)
            signed += len({parse_answer(one) for one in answers})
        return signed / (cpu_seconds(signer.pid) - spent)
    finally:
        client.close()
        signer.kill()


async def _make_key(client: SignerClient) -> None:
    """Do a hub's part: have the signer make a key, and bring that key."""
    (made,) = map(json.loads, await client.send([b'{"make": true}\n']))
    ring = json.loads(KeyRing().add(made["id"], int(time.time())).render())
    load = {"load": {"ring": ring, "sealed": {made["id"]: made["sealed"]}}}
    (loaded,) = map(json.loads, await client.send([json.dumps(load).encode() + b"\n"]))
    if "loaded" not in loaded:
        raise BenchError(f"the signer does not take its key: {loaded}")


# The first token of a guest


def _first_row(fleet: Fleet) -> Row:
    """Request a token of an audience that no guest has requested before, from a complete host."""
    bench, name = fleet.bench, network_name(0)
    daemon = fleet.daemon(0)
    try:
        daemon.wait_serving(1)
        daemon.wait_settled()
        asking = [Guest(bench.lab, name, guest(one)) for one in range(GUESTS)]
        sessions = [open_session(one) for one in asking]
        _wait_token(asking[0], sessions[0])
        # The host fetches the tokens of named audiences.
        time.sleep(bench.scale.settle_s)
        taken = []
        for number in range(bench.scale.fleet_changes):
            one, session = asking[number % GUESTS], sessions[number % GUESTS]
            began = time.perf_counter()
            answer = request_token(one, session, f"first-{number}")
            taken.append((time.perf_counter() - began) * 1000)
            if answer.status != _OK:
                raise BenchError(f"a first token: {answer.status} ({daemon.last_words()})")
            time.sleep(_PAUSE_S)
        for one in asking:
            one.close()
    finally:
        daemon.stop()
    middle, worst = median(taken), percentile(taken, 99)
    return Row(
        key="identity-first",
        what="a guest's request for a token that its host does not hold → the token, signed beside a hub",
        figure=f"p50 {middle:.1f} ms, p99 {worst:.1f} ms",
        verdict=judge(max(middle / _FIRST_P50_MS, worst / _FIRST_P99_MS), _FIRST_BAR),
        bar=_FIRST_BAR.text,
        value=worst,
        how=(
            f"{len(taken)} requests of {GUESTS} guests of a complete host, one after the other, each for another "
            f"audience; {fleet.size:,} instances are stored; everything shares the machine's processors"
        ),
        data={"ms": taken},
    )


def _wait_token(one: Guest, session: str) -> None:
    if not wait_until(lambda: request_token(one, session, AUDIENCES[0]).status == _OK, _WAIT_S):
        raise BenchError(f"{one.address} gets no token")


# Renewals


@dataclass(frozen=True, slots=True)
class _Renewal:
    """Processor time of renewals, in seconds."""

    hub: Cost
    signer_s: float

    @property
    def total_s(self) -> float:
        return self.hub.hub_s + self.hub.haproxy_s + self.signer_s

    def share(self, tokens: int, life_s: float) -> float:
        """Return the percentage of a processor for all guests' tokens, if this is the cost of so many tokens."""
        period_s = life_s * (EARLIEST + LATEST) / 2
        return self.total_s / tokens * _GUESTS * len(AUDIENCES) / period_s * 100


def _renewals_row(fleet: Fleet) -> Row:
    """Renew all tokens of one host after the other as hosts do, each by a request on a new connection."""
    count = min(fleet.bench.scale.fleet_changes, fleet.hosts)
    if not wait_until(lambda: _renew(fleet, 0, strict=False), _WAIT_S, every_s=0.2):
        raise BenchError("the hubs sign no token")
    signer = fleet.signers[0].pid
    before, signer_before = fleet.hubs[0].cost(), cpu_seconds(signer)
    for number in range(count):
        _renew(fleet, number)
    spent = _Renewal(fleet.hubs[0].cost() - before, cpu_seconds(signer) - signer_before)
    each = fleet.instances * len(AUDIENCES)
    longest, usual = (spent.share(count * each, life_s) for life_s in _LIVES_S)
    token_us = [
        one / count / each * 1e6 for one in (spent.hub.hub_s, spent.hub.haproxy_s, spent.signer_s)
    ]
    return Row(
        key="identity-renewals",
        what=f"processor time of a hub for the renewals of {_GUESTS:,} guests of {len(AUDIENCES)} audiences, RS256",
        figure=(
            f"{longest:.1f} % of a processor with tokens of an hour, {usual:.0f} % with those of ten minutes, as by "
            f"default; a token: hub {token_us[0]:.0f}, its HAProxy {token_us[1]:.0f}, signer {token_us[2]:.0f} µs"
        ),
        verdict=judge(longest, _RENEWALS_BAR),
        bar=f"{_RENEWALS_BAR.text}, tokens of an hour",
        value=longest,
        how=(
            f"{count} simulated hosts, each with a certificate, renew {each} tokens of {fleet.instances} guests by one "
            f"request on a new TLS connection; {fleet.size:,} instances are stored; a token is renewed after "
            f"{EARLIEST:.0%} to {LATEST:.0%} of its life"
        ),
        data={"longest_percent": longest, "usual_percent": usual, "token_us": token_us},
    )


def _renew(fleet: Fleet, number: int, *, strict: bool = True) -> bool:
    """Renew all tokens of a simulated host; return whether the hub signed them.

    Raises:
        BenchError: The hub did not, and `strict` is set.
    """
    tokens = [
        {
            "instance": instance_name(number, one),
            "network": network_of(number, one, fleet.networks),
            "audience": audience,
            "nonce": None,
        }
        for one in range(fleet.instances)
        for audience in AUDIENCES
    ]
    high, low = divmod(number, _PARTS_OF_AN_ADDRESS)
    connection = HTTPSConnection(
        "127.0.0.1",
        fleet.hubs[0].port,
        timeout=_WAIT_S,
        context=_context(fleet.certificates, number),
        source_address=(f"127.1.{high}.{low + 1}", 0),
    )
    with closing(connection):
        body = json.dumps({"tokens": tokens})
        connection.request("POST", IDENTITY_PATH, body, {"content-type": "application/json"})
        response = connection.getresponse()
        answer: dict[str, Any] = json.loads(response.read())
    signed = sum("token" in one for one in answer.get("answers", ()))
    if strict and signed != len(tokens):
        raise BenchError(f"{response.status}, {signed} of {len(tokens)} tokens: {answer!r:.300}")
    return signed == len(tokens)


def _context(certificates: Path, number: int) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(certificates / "ca.crt")
    context.load_cert_chain(certificates / f"{host_name(number)}.pem")
    return context
