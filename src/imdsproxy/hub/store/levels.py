"""Check for hosts that are too old for the records of a write. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from imdsproxy.errors import Problem, SourceRefused
from imdsproxy.fleet import codec, layout
from imdsproxy.fleet.codec import Json
from imdsproxy.fleet.layout import HostId
from imdsproxy.fleet.stream import ItemKey
from imdsproxy.hub.store.plan_writes import Transaction
from imdsproxy.hub.store.state import FleetState, needs_of
from imdsproxy.model.records.levels import Schema

_KINDS: Final = {
    layout.NETWORKS: "network",
    layout.INSTANCES: "instance",
    layout.POLICIES: "policy",
}


@dataclass(frozen=True, slots=True)
class Needed:
    """Level of records that a host must be able to read.

    Attributes:
        item: Item that needs the level.
    """

    level: int
    item: ItemKey


def fit_item(schema: Schema, item: ItemKey, value: Json, level: int) -> Json:
    """Return an item's value for a host that reads records up to a level."""
    kind = item.partition("/")[0]
    if kind == "policy":
        return dict(schema.fit(kind, value, level))
    if "record" in value:
        return {**value, "record": schema.fit(kind, value["record"], level)}
    return value


def plan_levels(state: FleetState, planned: Transaction, schema: Schema) -> dict[HostId, Needed]:
    """Return the level that hosts need for the items of a write; hosts that need only level 1 are missing."""
    if schema.level == 1:
        return {}
    written: dict[ItemKey, Json] = {}
    for key, put in planned.puts.items():
        for prefix, kind in _KINDS.items():
            if key.startswith(prefix):
                written[f"{kind}/{key.removeprefix(prefix)}"] = codec.decode(put)
    needed: dict[HostId, Needed] = {}
    for item, value in written.items():
        hosts, items = _reached(state, item, value)
        for host in hosts:
            for each in (item, *items, "policy/fleet", f"policy/host/{host}"):
                level = _level(schema, each, written.get(each) or _stored(state, each))
                if level > needed.get(host, Needed(1, "")).level:
                    needed[host] = Needed(level, each)
    return needed


def refuse_older(needed: Mapping[HostId, Needed], levels: Mapping[HostId, int]) -> None:
    """Refuse a write that a host would not understand; hosts of unknown level, which are away, do not count.

    Raises:
        SourceRefused: A host is too old.
    """
    problems = [
        Problem("hosts", f"host {host} is too old for what {one.item} says", "upgrade it first")
        for host, one in sorted(needed.items())
        if levels.get(host, one.level) < one.level
    ]
    if problems:
        raise SourceRefused(
            "hosts of an older version would not observe a limit",
            hint="upgrade imdsproxy on these hosts, then write it again",
            problems=problems,
        )


def _reached(
    state: FleetState, item: ItemKey, value: Json
) -> tuple[Iterable[HostId], Iterable[ItemKey]]:
    """Return the hosts that get an item, and the shared items that they need with it."""
    kind, _, rest = item.partition("/")
    if kind == "instance":
        return layout.parse_instance(codec.encode(value)).hosts, needs_of(value["record"])
    if item == "policy/fleet":
        return state.enrolled(), ()
    if rest.startswith("host/"):
        return (HostId(rest.removeprefix("host/")),), ()
    return state.hosts_with(item), ()


def _stored(state: FleetState, item: ItemKey) -> Json:
    found = state.item(item)
    return {} if found is None else found[1]


def _level(schema: Schema, item: ItemKey, value: Json) -> int:
    kind = item.partition("/")[0]
    return schema.needed(kind, value if kind == "policy" else value.get("record"))
