"""Keys of a fleet's issuer, as hubs change them in etcd."""

from typing import Final

from imdsproxy.fleet.layout import StoredIssuer, parse_issuer, render_issuer
from imdsproxy.hub.hosts.issuer import plan_steps
from imdsproxy.issuer.rotation import Pace

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
