"""Views of a fleet's records for operators, from the hub's copy of etcd and hosts' acknowledgements."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from imdsproxy.api.answers import NotServed
from imdsproxy.api.bodies import choose_named
from imdsproxy.errors import SourceCorrupt
from imdsproxy.fleet import codec, layout
from imdsproxy.fleet.codec import Json
from imdsproxy.fleet.layout import HostId, StoredInstance, StoredNetwork
from imdsproxy.fleet.stream import ItemKey
from imdsproxy.host.turns import in_turns
from imdsproxy.hub.hosts.in_force import NOT_CONNECTED, Reported
from imdsproxy.hub.store.scopes import read_owned, read_scope
from imdsproxy.hub.store.state import FleetState
from imdsproxy.hub.store.transactions import no_such, read_network, record_of
from imdsproxy.model.entities import Instance, InstanceId, NetworkId
from imdsproxy.model.matching import matcher
from imdsproxy.model.records import render_record

_SOURCE: Final = "fleet"


@dataclass(frozen=True, slots=True)
class Wanted:
    """Filter for a list of instances; see `model.matching.matcher`."""

    text: str = ""
    network: NetworkId | None = None
    project: str | None = None
    host: HostId | None = None


@dataclass(frozen=True, slots=True)
class Views:
    """Records that an operator may read.

    Args:
        scope: Project that the operator is limited to; `None` for all.
    """

    state: FleetState
    scope: str | None = None

    # Lists and names

    def networks(self, reported: Reported) -> Iterator[Json]:
        """Iterate over the views of the networks that the operator may know, sorted by id."""
        scope = read_scope(self.state.value, self.scope)
        for key in sorted(self.state.keys(layout.NETWORKS)):
            network = NetworkId(key.removeprefix(layout.NETWORKS))
            known = read_network(self.state.value, network)
            if known is not None and (scope is None or scope.knows_network(known[0].record)):
                yield self._describe_network(network, *known, reported)

    async def instances(
        self, wanted: Wanted
    ) -> AsyncIterator[tuple[InstanceId, StoredInstance, int]]:
        """Iterate over matching instances with their revisions, sorted by id; yields to the event loop."""
        word = b"" if wanted.network is None else f'"network":"{wanted.network}"'.encode()
        matches = matcher(wanted.text, wanted.project)
        if wanted.host is None:
            keys = sorted(self.state.keys(layout.INSTANCES))
        else:
            keys = sorted(map(layout.instance_key, self.state.instances_on(wanted.host)))
        async for key in in_turns(keys):
            instance = InstanceId(key.removeprefix(layout.INSTANCES))
            found = self.state.value(key) if self._may_know(instance) else None
            if found is None or word not in found[0]:
                continue
            known = self.known(instance)
            if known is None:
                continue
            try:
                fits = matches is None or matches(record_of(known[0]))
            except SourceCorrupt:
                continue  # its hosts refuse the record, and report that
            if fits:
                yield instance, *known

    def find_network(self, text: str) -> NetworkId:
        """Return the id of the network with this id or name; the text itself if the operator may know no such network.

        Raises:
            RequestRefused: Several networks have the name.
        """
        if self._known_network(NetworkId(text)) is not None:
            return NetworkId(text)
        networks = self.state.keys(layout.NETWORKS)
        return NetworkId(self._find(text, layout.NETWORKS, networks, self._network_name))

    def find_instance(self, text: str) -> InstanceId:
        """Return the id of the instance with this id or name; see `find_network`."""
        if self.known(InstanceId(text)) is not None:
            return InstanceId(text)
        keys = self.state.keys(layout.INSTANCES)
        own = (
            one for one in keys if self._may_know(InstanceId(one.removeprefix(layout.INSTANCES)))
        )
        return InstanceId(self._find(text, layout.INSTANCES, own, self._instance_name))

    def _find(
        self, text: str, prefix: str, keys: Iterable[str], name_of: Callable[[str], object]
    ) -> str:
        # The search for the name avoids parsing most values: a fleet has hundreds of thousands.
        word = codec.encode({"name": text})[1:-1]
        found = []
        for key in keys:
            value = self.state.value(key)
            if value is not None and word in value[0] and name_of(key.removeprefix(prefix)) == text:
                found.append(key.removeprefix(prefix))
        return choose_named(text, found)

    def _network_name(self, identity: str) -> object:
        known = self._known_network(NetworkId(identity))
        return None if known is None else known[0].record.get("name")

    def _instance_name(self, identity: str) -> object:
        known = self.known(InstanceId(identity))
        return None if known is None else known[0].record.get("name")

    def known(self, instance: InstanceId) -> tuple[StoredInstance, int] | None:
        """Return an instance and its revision; `None` if the operator may know no such instance."""
        if not self._may_know(instance):
            return None
        return read_owned(self.state.value, instance, self.scope)

    def _may_know(self, instance: InstanceId) -> bool:
        """Return whether an instance may belong to the operator's project, without parsing its record."""
        needs = self.state.placement(instance)[1]
        return self.scope is None or _policy_of(self.scope) in needs

    def _known_network(self, network: NetworkId) -> tuple[StoredNetwork, int] | None:
        """Return a network and its revision; `None` if the operator may know no such network."""
        known = read_network(self.state.value, network)
        scope = read_scope(self.state.value, self.scope)
        hidden = known is None or (scope is not None and not scope.knows_network(known[0].record))
        return None if hidden else known

    def hosts(self) -> frozenset[HostId]:
        """Return the hosts that the operator may know.

        Operators of all projects know all enrolled hosts. Operators of one project know the hosts that are granted to
        the project or have its instances.
        """
        enrolled = frozenset(self.state.enrolled())
        scope = read_scope(self.state.value, self.scope)
        if scope is None:
            return enrolled
        granted = frozenset(one for one in enrolled if scope.grant.has_host(one))
        return granted | self.state.hosts_with(_policy_of(scope.project))

    def placed_hosts(self) -> frozenset[HostId]:
        """Return the hosts to wait for: all enrolled hosts, or for one project the hosts with its instances."""
        if self.scope is None:
            return frozenset(self.state.enrolled())
        return self.state.hosts_with(_policy_of(self.scope))

    def items_on(self, hosts: Iterable[HostId]) -> set[ItemKey] | None:
        """Return the items that the operator may know on these hosts; `None` for all."""
        if self.scope is None:
            return None
        item = _policy_of(self.scope)
        return {one for host in hosts for one in self.state.items_beside(host, item)}

    def stored(self, instance: InstanceId) -> tuple[StoredInstance, int]:
        """Return an instance and its revision; raise `NotFound` if the operator may know no such instance."""
        known = self.known(instance)
        if known is None:
            self._refuse_unread("instance", layout.instance_key(instance))
            raise no_such("instance", instance)
        return known

    def _refuse_unread(self, kind: str, key: str) -> None:
        """Raise `SourceCorrupt` for an unreadable record; its project is unknown, so only without a scope."""
        found = self.state.unreadable.get(key)
        if found is not None and self.scope is None:
            raise SourceCorrupt(
                f"{kind} {key.rpartition('/')[2]} is not readable in etcd: {found.why}",
                hint=f"write the whole record again: imdsproxy --fleet URL {kind} add",
            )

    # Single records

    def network(self, network: NetworkId, reported: Reported) -> Json:
        """Return a network in the form of a host's admin API, with its hosts and revision; raise `NotFound`."""
        known = self._known_network(network)
        if known is None:
            self._refuse_unread("network", layout.network_key(network))
            raise no_such("network", network)
        return self._describe_network(network, *known, reported)

    def _describe_network(
        self, network: NetworkId, stored: StoredNetwork, revision: int, reported: Reported
    ) -> Json:
        item = f"network/{network}"
        use = self._use(item, stored.record)
        hosts = sorted(use)
        failed = [
            f"host {host}: {why}" for host in hosts if (why := _failure(reported, host, {item}))
        ]
        return {
            "record": stored.record,
            "source": _SOURCE,
            "instances": use.total(),
            "serving": not failed,
            "not_served": NotServed(network, "not-in-force", failed[0]) if failed else None,
            "hosts": hosts,
            "revision": revision,
        }

    def _use(self, item: ItemKey, record: Json) -> Counter[HostId]:
        """Count the instances in a network by host; in a shared network only those of the operator's project."""
        if self.scope is None or record.get("project") == self.scope:
            return self.state.count_by_host(item)
        return self.state.count_both(item, _policy_of(self.scope))

    def instance(
        self, instance: InstanceId, reported: Reported, user_data: bytes | None = None
    ) -> Json:
        """Return an instance in the form of a host's admin API, with the given user data; raise `NotFound`."""
        stored, revision = self.stored(instance)
        record = replace(record_of(stored), user_data=user_data)
        return _describe(record, stored, revision, reported)

    def page(self, instances: Iterable[InstanceId], reported: Reported) -> list[Json]:
        """Return the summaries of instances; skip instances that were removed since the search."""
        known = (self.known(one) for one in instances)
        shown = (self._summary(*one, reported) for one in known if one is not None)
        return [one for one in shown if one is not None]

    def _summary(self, stored: StoredInstance, revision: int, reported: Reported) -> Json | None:
        """Return an instance without payloads, but with their sizes; `None` for a record of another program."""
        try:
            record = record_of(stored)
        except SourceCorrupt:
            return None  # its hosts refuse the record, and report that
        sizes = {
            "user_data_bytes": 0 if stored.user_data is None else stored.user_data.size,
            "vendor_data_bytes": len(record.vendor_data or b""),
        }
        return _describe(replace(record, vendor_data=None), stored, revision, reported) | sizes

    async def summaries(self, wanted: Wanted, reported: Reported) -> AsyncIterator[Json]:
        async for _, stored, revision in self.instances(wanted):
            if (shown := self._summary(stored, revision, reported)) is not None:
                yield shown


def _policy_of(project: str) -> ItemKey:
    return f"policy/project/{project}"


def _describe(record: Instance, stored: StoredInstance, revision: int, reported: Reported) -> Json:
    items = {f"instance/{record.id}", *(f"network/{one.network}" for one in record.ports)}
    pending = [
        f"host {host}: {why}" for host in stored.hosts if (why := _pending(reported, host, items))
    ]
    return {
        "record": render_record(record),
        "ec2_id": record.ec2_id,
        "uuid": record.uuid,
        "source": _SOURCE,
        "revision": str(revision),
        "conflicts": [],
        "pending": pending,
        "hosts": list(stored.hosts),
    }


def _pending(reported: Reported, host: HostId, items: set[str]) -> str | None:
    return _failure(reported, host, items) if host in reported else NOT_CONNECTED


def _failure(reported: Reported, host: HostId, items: set[str]) -> str | None:
    known = reported.get(host, {})
    failed = [f"{item}: {why}" for item, why in known.get("failed", {}).items() if item in items]
    return "; ".join(failed) or None
