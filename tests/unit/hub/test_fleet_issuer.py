"""Keys of a fleet's issuer, as hubs change them in etcd."""

from types import SimpleNamespace
from typing import Any, Final, cast

import pytest

from imdsproxy.errors import SourceUnavailable
from imdsproxy.fleet import layout
from imdsproxy.fleet.layout import HostId, StoredIssuer, parse_issuer, render_issuer
from imdsproxy.host.clock import Clock
from imdsproxy.hub.hosts.cloud import CloudGuests
from imdsproxy.hub.hosts.issuer import Asked, FleetIssuer, plan_steps
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


async def test_an_outage_of_openstack_is_waited_for_once_in_a_batch() -> None:
    reads: list[HostId] = []

    async def ask_in_vain(host: HostId) -> Any:
        reads.append(host)
        raise SourceUnavailable("Nova is away")

    async def list_ports(_: HostId) -> Any:
        return []

    issuer = (render_issuer(_stored(("a", "signing", 0))), 5)
    fleet = cast("Any", SimpleNamespace(value={layout.ISSUER: issuer}.get))
    unused = cast("Any", None)
    made = FleetIssuer(
        url="https://id.cloud.example",
        signer=cast("Any", SimpleNamespace(is_open=True)),
        state=fleet,
        clock=Clock(),
        pace=_PACE,
        doubt_clock=unused,
        cloud=CloudGuests(ask_in_vain, list_ports, 60.0, lambda: 100.0),
        _loaded=5,
    )
    asked = [
        Asked(InstanceId(name), NetworkId("blue"), audience)
        for name in ("web", "db", "cache")
        for audience in ("keystone", "vault")
    ]
    with pytest.raises(SourceUnavailable, match="Nova is away"):
        await made.sign(HostId("lab"), asked)
    assert reads == [HostId("lab")]
