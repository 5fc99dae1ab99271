"""Which instances of a fleet an operator's list has."""

import asyncio
from collections import Counter

import pytest

from imdsproxy.fleet import layout
from imdsproxy.fleet.codec import Json
from imdsproxy.fleet.layout import HostId, StoredInstance
from imdsproxy.host.turns import AT_ONCE
from imdsproxy.hub.api.views import Views, Wanted
from imdsproxy.hub.store.state import Change, FleetState
from imdsproxy.model.entities import InstanceId, NetworkId
from support.tasks import background


def _instance(
    name: str, *hosts: str, network: str = "blue", removed_at: int | None = None, **record: str
) -> Change:
    shape: Json = {"id": name, "name": name, "ports": [{"network": network}], **record}
    stored = StoredInstance(tuple(map(HostId, hosts)), shape, removed_at=removed_at)
    return Change(layout.instance_key(InstanceId(name)), layout.render_instance(stored), 7)


def _state(*changes: Change) -> FleetState:
    state = FleetState()
    state.apply(7, changes)
    return state


_FLEET = _state(
    _instance("db", "a", project="shop"),
    _instance("web", "a", "b", network="red", project="shop"),
    _instance("mail", "b", project="office", hostname="post"),
    _instance("gone", removed_at=1, project="shop"),
    _instance("spoilt", "c", nonsense="x", project="odd"),
)


@pytest.mark.parametrize(
    ("wanted", "scope", "found"),
    [
        (Wanted(), None, ["db", "mail", "web"]),
        (Wanted(host=HostId("a")), None, ["db", "web"]),
        (Wanted(host=HostId("none")), None, []),
        (Wanted(network=NetworkId("red")), None, ["web"]),
        (Wanted(project="shop"), None, ["db", "web"]),
        (Wanted("POST"), None, ["mail"]),
        (Wanted("web", host=HostId("b")), None, ["web"]),
        (Wanted("web", project="office"), None, []),
        (Wanted(), "office", ["mail"]),
        (Wanted(project="shop"), "office", []),
    ],
)
async def test_a_list_has_what_is_wanted_and_may_be_seen_and_can_be_read(
    wanted: Wanted, scope: str | None, found: list[str]
) -> None:
    shown = [one async for one in Views(_FLEET, scope).summaries(wanted, {})]
    assert [one["record"]["id"] for one in shown] == found


def test_a_page_has_no_record_that_is_gone_since_the_search_or_that_another_program_wrote() -> None:
    searched = map(InstanceId, ("db", "gone", "none", "spoilt", "mail"))
    shown = Views(_FLEET, None).page(searched, {})
    assert [one["record"]["id"] for one in shown] == ["db", "mail"]
    own = Views(_FLEET, "office").page(map(InstanceId, ("db", "mail")), {})
    assert [one["record"]["id"] for one in own] == ["mail"]


async def test_a_list_of_a_large_fleet_takes_turns_with_other_work_and_with_changes() -> None:
    state = _state(*(_instance(f"i{number:04}", "a") for number in range(4 * AT_ONCE)))
    turn, turns = 0, list[int]()

    async def other() -> None:
        nonlocal turn
        while True:
            turn += 1
            state.apply(8 + turn, [_instance(f"new-{turn}", "b"), _instance(f"i{turn:04}", "b")])
            await asyncio.sleep(0)

    async with background(other()):
        async for one in Views(state).summaries(Wanted("i"), {}):
            turns.append(turn)
            assert one["record"]["id"].startswith("i")
    assert len(turns) == 4 * AT_ONCE
    assert max(Counter(turns).values()) <= AT_ONCE
