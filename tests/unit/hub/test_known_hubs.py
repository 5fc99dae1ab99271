"""Hubs that have ended: listed as absent until they come back or are revoked."""

from imdsproxy.fleet import layout
from imdsproxy.fleet.layout import (
    HubPlace,
    KnownHub,
    StoredOperator,
    operator_key,
    render_hub,
    render_known_hub,
    render_operator,
)
from imdsproxy.hub.store.etcd_messages import absent, unchanged
from imdsproxy.hub.store.state import Change, FleetState
from imdsproxy.hub.store.upkeep import HubRecord, list_hubs, plan_hub_records

_URLS = {name: f"https://{name}:8469" for name in ("hub-1", "hub-2")}


def _state(*running: str, **records: int | None) -> FleetState:
    """What etcd has, at revision 5: which hubs run, and since when others are absent."""
    values = {layout.HUBS + name: render_hub(HubPlace(_URLS[name])) for name in running}
    for name, since in records.items():
        hub = name.replace("_", "-")
        values[layout.KNOWN_HUBS + hub] = render_known_hub(KnownHub(_URLS[hub], since))
    state = FleetState()
    state.apply(5, [Change(key, value, 5) for key, value in values.items()])
    return state


def _planned(state: FleetState) -> list[HubRecord]:
    return list(plan_hub_records(state, "hub-1", _URLS["hub-1"], 1000.5))


def test_a_hub_writes_its_own_record_where_that_is_missing_or_says_otherwise() -> None:
    own = [HubRecord(f"{layout.KNOWN_HUBS}hub-1", KnownHub(_URLS["hub-1"]))]
    assert _planned(_state("hub-1")) == own
    # As after it was started again.
    assert _planned(_state("hub-1", hub_1=900)) == own
    assert _planned(_state("hub-1", hub_1=None)) == []


def test_a_hub_that_ended_is_noted_once_by_those_that_run_unless_it_is_back() -> None:
    key = f"{layout.KNOWN_HUBS}hub-2"
    compares = unchanged(key, 5), absent(f"{layout.HUBS}hub-2")
    gone = HubRecord(key, KnownHub(_URLS["hub-2"], 1000), compares)
    assert _planned(_state("hub-1", hub_1=None, hub_2=None)) == [gone]
    assert _planned(_state("hub-1", hub_1=None, hub_2=900)) == []
    assert _planned(_state("hub-1", "hub-2", hub_1=None, hub_2=None)) == []


def test_every_hub_is_listed_until_it_is_revoked() -> None:
    state = _state("hub-1", hub_1=None, hub_2=900)
    hubs = list_hubs(state, "hub-1", {}, frozenset())
    assert [(one["name"], one["absent"], one["absent_since"]) for one in hubs] == [
        ("hub-1", False, None),
        ("hub-2", True, 900),
    ]
    revoked = render_operator(StoredOperator(950))
    state.apply(6, [Change(operator_key("hub-2"), revoked, 6)])
    assert [one["name"] for one in list_hubs(state, "hub-1", {}, frozenset())] == ["hub-1"]
