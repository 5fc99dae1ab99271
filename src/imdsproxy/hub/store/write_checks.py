"""Checks of a planned write: hosts that are too old for its records, and networks that share a listener. Pure.

Two networks may have the same listener if no host has instances in both: a host can serve only one. An operator of one
project must not bring a network to a host where another project's network may need the listener later. The check does
not see concurrent writes of other hubs: in that case the host reports that it cannot serve the second network.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from imdsproxy.errors import AlreadyExists, Problem, RecordConflict, SourceRefused
from imdsproxy.fleet import codec, layout
from imdsproxy.fleet.codec import Json
from imdsproxy.fleet.layout import HostId
from imdsproxy.fleet.stream import ItemKey
from imdsproxy.host.names import Naming
from imdsproxy.hub.store.scopes import read_grant, read_scope
from imdsproxy.hub.store.state import FleetState, needs_of
from imdsproxy.hub.store.transactions import Transaction
from imdsproxy.model.claims import find_shared, listener_place
from imdsproxy.model.entities import InstanceId, Network, NetworkId
from imdsproxy.model.records import parse_network
from imdsproxy.model.records.grant import EVERY_HOST
from imdsproxy.model.records.levels import Schema

_KINDS: Final = {
    layout.NETWORKS: "network",
    layout.INSTANCES: "instance",
    layout.POLICIES: "policy",
}


@dataclass(frozen=True, slots=True)
class Needed:
    """Level of records that a host must be able to read, and the item that needs the level."""

    level: int
    item: ItemKey


def fit_item(schema: Schema, item: ItemKey, value: Json, level: int) -> Json:
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
    """Raise `SourceRefused` if a host would not understand a write; hosts that are away do not count."""
    problems = [
        Problem(
            "hosts", f"host {host} is too old for {one.item}", "upgrade imdsproxy on the host first"
        )
        for host, one in sorted(needed.items())
        if levels.get(host, one.level) < one.level
    ]
    if problems:
        raise SourceRefused(
            "hosts of an older version would ignore a limit",
            hint="upgrade imdsproxy on these hosts, then write the record again",
            problems=problems,
        )


def _reached(
    state: FleetState, item: ItemKey, value: Json
) -> tuple[Iterable[HostId], Iterable[ItemKey]]:
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


_ITEM: Final = "network/"
_NAMING: Final = Naming()


def refuse_shared(state: FleetState, planned: Transaction) -> None:
    """Raise `RecordConflict`, which names both networks, if a write gives a host two networks with one listener.

    Raise `AlreadyExists` if an operator of one project creates a network whose names on hosts are another network's.
    """
    after = _After(state, planned)
    problems = list(after.problems())
    if problems:
        raise RecordConflict("a listener is in use", problems=problems)
    if planned.scope is not None:
        _refuse_names(state, after.written)


def _refuse_names(state: FleetState, written: Collection[NetworkId]) -> None:
    """Refuse a new network whose names on hosts equal another's: an id for a short digest can be found in days."""
    new = {one for one in written if state.value(layout.network_key(one)) is None}
    links = {_NAMING.link(one): one for one in new}
    for key in state.keys(layout.NETWORKS) if links else ():
        link = _NAMING.link(NetworkId(key.removeprefix(layout.NETWORKS)))
        if link in links:
            raise AlreadyExists(f"the id {links[link]} is taken", hint="use another id")


@dataclass(slots=True)
class _After:
    state: FleetState
    planned: Transaction
    written: set[NetworkId] = field(default_factory=set)
    written_at: dict[str, set[NetworkId]] = field(default_factory=dict)
    records: dict[NetworkId, Network | None] = field(default_factory=dict)
    added: Counter[tuple[HostId, NetworkId]] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        for key, value in self.planned.puts.items():
            if key.startswith(layout.NETWORKS):
                network, record = NetworkId(key.removeprefix(layout.NETWORKS)), _read(value)
                self.written.add(network)
                self.records[network] = record
                if record is not None:
                    self.written_at.setdefault(listener_place(record)[0], set()).add(network)
            elif key.startswith(layout.INSTANCES):
                before = self.state.placement(InstanceId(key.removeprefix(layout.INSTANCES)))
                stored = layout.parse_instance(value)
                self._add(*before, -1)
                self._add(stored.hosts, needs_of(stored.record), 1)

    def _add(self, hosts: tuple[HostId, ...], needs: tuple[str, ...], number: int) -> None:
        for item in needs:
            if item.startswith(_ITEM):
                network = NetworkId(item.removeprefix(_ITEM))
                for host in hosts:
                    self.added[host, network] += number

    def problems(self) -> Iterator[Problem]:
        """Yield a problem for each network that is new on a host, or has a new listener, and shares it there."""
        reported = set[tuple[HostId, frozenset[NetworkId]]]()
        for host, network in sorted(self._new()):
            record = self._record(network)
            if record is None:
                continue
            others = self._others(host, record)
            holder = find_shared([record, *others.values()], others).get(network)
            if holder is None or (host, frozenset({network, holder})) in reported:
                continue
            reported.add((host, frozenset({network, holder})))
            yield self._explain(host, network, others[holder])

    def _new(self) -> set[tuple[HostId, NetworkId]]:
        new = {
            (host, network)
            for (host, network), number in self.added.items()
            if number > 0 and not self.state.count_on(host, f"{_ITEM}{network}")
        }
        for network in self.written:
            known, record = self._known(network), self.records[network]
            if record is not None and known is not None and known.listener != record.listener:
                hosts = self.state.hosts_with(f"{_ITEM}{network}")
                new |= {(host, network) for host in hosts if self._count(host, network) > 0}
        return new

    def _others(self, host: HostId, record: Network) -> dict[NetworkId, Network]:
        where, found = listener_place(record)[0], dict[NetworkId, Network]()
        beside = self.written_at.get(where, set())
        for one in {*self.state.networks_at(where), *beside} - {record.id}:
            other = self._record(one)
            if other is None or listener_place(other)[0] != where:
                continue
            if self._count(host, one) > 0 or self._may_come(host, record, other):
                found[one] = other
        return found

    def _may_come(self, host: HostId, record: Network, other: Network) -> bool:
        """Return whether another project's network may need the listener on a host later.

        The check concerns writes by operators of one project. Networks of the same project take the listener first
        come, first served. If hosts were granted to the other project, its networks can come to them only.
        """
        scope = self.planned.scope
        if scope is None or record.project == other.project == scope:
            return False
        if other.project is None:
            return True
        hosts = read_grant(self.state.value, other.project)[0].hosts
        return not hosts or EVERY_HOST in hosts or host in hosts

    def _count(self, host: HostId, network: NetworkId) -> int:
        return self.state.count_on(host, f"{_ITEM}{network}") + self.added.get((host, network), 0)

    def _record(self, network: NetworkId) -> Network | None:
        if network not in self.records:
            self.records[network] = self._known(network)
        return self.records[network]

    def _known(self, network: NetworkId) -> Network | None:
        found = self.state.value(layout.network_key(network))
        return None if found is None else _read(found[0])

    def _explain(self, host: HostId, network: NetworkId, holder: Network) -> Problem:
        scope, who = read_scope(self.state.value, self.planned.scope), "another network"
        if scope is None or scope.knows_network({"id": holder.id, "project": holder.project}):
            who = f"network {holder.id}"
            user = self._user(host, holder.id)
            # Operators of one project do not learn about other projects' instances.
            if user is not None and scope is None:
                who += f", which has instance {user}"
        return Problem(
            "listener" if network in self.written else "hosts",
            f"network {network} has the same listener on host {host} as {who}",
            "give one of the two networks another listener, or place the instance on another host",
        )

    def _user(self, host: HostId, network: NetworkId) -> InstanceId | None:
        item = f"{_ITEM}{network}"
        on_host = sorted(self.state.instances_on(host))
        return next((one for one in on_host if item in self.state.placement(one)[1]), None)


def _read(value: bytes) -> Network | None:
    read = parse_network(layout.parse_network(value).record)
    return read if isinstance(read, Network) else None
