"""Keys of a fleet's issuer, as hubs change them in etcd."""

import asyncio
import json
from collections.abc import Awaitable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, cast

import pytest

from imdsproxy.errors import SourceUnavailable
from imdsproxy.fleet import layout
from imdsproxy.fleet.layout import HostId, StoredIssuer, parse_issuer, render_issuer
from imdsproxy.host.clock import Clock
from imdsproxy.hub.hosts.cloud import CloudGuests
from imdsproxy.hub.hosts.issuer import Asked, FleetIssuer, plan_steps
from imdsproxy.issuer.exchange import MOST_AT_ONCE, Token, render_answer
from imdsproxy.issuer.local_signer import SignerClient
from imdsproxy.issuer.rotation import Pace
from imdsproxy.model.entities import InstanceId, NetworkId

_PACE: Final = Pace(3600, 600)


def _stored(*keys: tuple[str, str, int]) -> StoredIssuer:
    entries = [{"id": name, "state": state, "since": since} for name, state, since in keys]
    names = [name for name, _, _ in keys]
    ring = {"format": 1, "sequence": 7, "keys": entries}
    return StoredIssuer(ring, {one: {"kid": one} for one in names}, dict.fromkeys(names, "c2VhbA"))


def test_steps_that_are_not_due_change_nothing() -> None:
    stored = _stored(("a", "signing", 0), ("b", "next", 1000))
    assert plan_steps(stored, _PACE, 8199) == stored


def test_a_key_that_has_gone_leaves_neither_its_public_key_nor_its_sealed_one() -> None:
    stored = _stored(("b", "signing", 0), ("a", "old", 1000))
    after = plan_steps(stored, _PACE, 1900)
    assert ({*after.keys}, {*after.sealed}) == ({"b"}, {"b"})
    assert parse_issuer(render_issuer(after)) == after
    assert after.ring["sequence"] == 8
    assert after.replaced == stored.replaced


def _issuer(signer: SignerClient) -> FleetIssuer:
    """Return an issuer of a fleet whose policy allows `vault`."""
    values = {
        layout.ISSUER: (render_issuer(_stored(("a", "signing", 0))), 5),
        f"{layout.POLICIES}fleet": (b'{"audiences":["vault"]}', 6),
    }
    unused = cast("Any", None)
    return FleetIssuer(
        url="https://id.cloud.example",
        signer=signer,
        state=cast("Any", SimpleNamespace(value=values.get)),
        clock=Clock(),
        pace=_PACE,
        doubt_clock=unused,
        _loaded=5,
    )


async def test_a_host_that_requests_without_end_takes_no_more_than_its_turn(
    tmp_path: Path,
) -> None:
    signed: list[str] = []
    token = render_answer(Token("t", "id", 0, 600))

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            if "sign" not in (shape := json.loads(line)):
                writer.write(b'{"loaded":1}\n')
                continue
            signed.append(json.loads(shape["sign"])["instance"])
            await asyncio.sleep(0)
            writer.write(token)
        writer.close()

    signer = SignerClient(tmp_path / "signer.sock")
    issuer = _issuer(signer)

    def ask(host: str, number: int) -> Awaitable[object]:
        asked = [Asked(InstanceId(host), NetworkId("blue"), "vault", project="p")] * number
        return issuer.sign(HostId(host), asked)

    async with await asyncio.start_unix_server(answer, signer.path):
        await ask("first", 1)
        flood = [ask("captured", MOST_AT_ONCE) for _ in range(40)]
        found = await asyncio.gather(*flood, ask("good", 1), return_exceptions=True)
        signer.close()
    assert not isinstance(found[-1], BaseException)
    # One batch was under way.
    assert signed.index("good") <= 1 + MOST_AT_ONCE
    refused = [one for one in found if isinstance(one, SourceUnavailable)]
    assert len(refused) == 40 - 16
    assert signed.count("captured") == 16 * MOST_AT_ONCE


async def test_an_outage_of_openstack_is_waited_for_once_in_a_batch() -> None:
    reads: list[HostId] = []

    async def ask_in_vain(host: HostId) -> Any:
        reads.append(host)
        raise SourceUnavailable("Nova is away")

    async def list_ports(_: HostId) -> Any:
        return []

    made = _issuer(cast("Any", SimpleNamespace(is_open=True)))
    made.cloud = CloudGuests(ask_in_vain, list_ports, 60.0, lambda: 100.0)
    asked = [
        Asked(InstanceId(name), NetworkId("blue"), audience)
        for name in ("web", "db", "cache")
        for audience in ("keystone", "vault")
    ]
    with pytest.raises(SourceUnavailable, match="Nova is away"):
        await made.sign(HostId("lab"), asked)
    assert reads == [HostId("lab")]
