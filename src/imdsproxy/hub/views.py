"""What operators read of a fleet's records: out of the hub's copy of etcd, and of what hosts acknowledged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from imdsproxy.admin.answers import LeftOut
from imdsproxy.core.fleet import layout
from imdsproxy.core.fleet.layout import HostId, Json, StoredInstance
from imdsproxy.core.matching import matcher
from imdsproxy.core.model import Instance, InstanceId, NetworkId
from imdsproxy.core.records import render_record
from imdsproxy.errors import RequestRefused, SourceCorrupt
from imdsproxy.hub.in_force import NOT_CONNECTED, Reported
from imdsproxy.hub.plan_writes import (
    in_scope,
    no_such,
    read_instance,
    read_network,
    record_of,
)
from imdsproxy.hub.state import FleetState

_SHOWN: Final = 5
_SOURCE: Final = "fleet"


@dataclass(frozen=True, slots=True)
class Views:
    """The records that an operator may read.

    Args:
        state: This hub's copy of etcd.
        scope: The project that the operator is limited to; `None` for all.
    """

    state: FleetState
    scope: str | None = None

    # Which there are

    def networks(self) -> Iterator[NetworkId]:
        """Every network, by id; to those of a project belong the shared ones, which have none."""
        for key in sorted(self.state.keys(layout.NETWORKS)):
            network = NetworkId(key.removeprefix(layout.NETWORKS))
            known = read_network(self.state.value, network)
            if known is not None and self._shares(known[0].record.get("project")):
                yield network

    def _shares(self, project: object) -> bool:
        return self.scope is None or project in {None, self.scope}

    def instances(
        self, network: NetworkId | None = None
    ) -> Iterator[tuple[InstanceId, StoredInstance, int]]:
        """Every instance with its revision, by id; with `network` those that have a port there."""
        word = None if network is None else f'"network":"{network}"'.encode()
        for key in sorted(self.state.keys(layout.INSTANCES)):
            found = self.state.value(key)
            if found is None or (word is not None and word not in found[0]):
                continue
            instance = InstanceId(key.removeprefix(layout.INSTANCES))
            known = read_instance(self.state.value, instance)
            if known is not None and in_scope(known[0].record, self.scope):
                yield instance, *known

    def find_network(self, text: str) -> NetworkId:
        """The id of the network that has this id or name; the text itself where none has.

        Raises:
            RequestRefused: Several have the name.
        """
        network = NetworkId(text)
        if read_network(self.state.value, network) is not None:
            return network
        return NetworkId(self._find(text, layout.NETWORKS, self._network_name))

    def find_instance(self, text: str) -> InstanceId:
        """The same for instances."""
        instance = InstanceId(text)
        if read_instance(self.state.value, instance) is not None:
            return instance
        return InstanceId(self._find(text, layout.INSTANCES, self._instance_name))

    def _find(self, text: str, prefix: str, name_of: Callable[[str], object]) -> str:
        # Most values are not parsed: a fleet has hundreds of thousands.
        word = layout.encode({"name": text})[1:-1]
        found = []
        for key in self.state.keys(prefix):
            value = self.state.value(key)
            if value is not None and word in value[0] and name_of(key.removeprefix(prefix)) == text:
                found.append(key.removeprefix(prefix))
        if len(found) > 1:
            shown = ", ".join(sorted(found)[:_SHOWN]) + (", …" if len(found) > _SHOWN else "")
            raise RequestRefused(f"{len(found)} have the name {text}", hint=f"use an id: {shown}")
        return found[0] if found else text

    def _network_name(self, identity: str) -> object:
        known = read_network(self.state.value, NetworkId(identity))
        return None if known is None else known[0].record.get("name")

    def _instance_name(self, identity: str) -> object:
        known = read_instance(self.state.value, InstanceId(identity))
        return None if known is None else known[0].record.get("name")

    def stored(self, instance: InstanceId) -> tuple[StoredInstance, int]:
        """An instance and its revision; `NotFound` where there is none that the operator may know."""
        known = read_instance(self.state.value, instance)
        if known is None or not in_scope(known[0].record, self.scope):
            raise no_such("instance", instance)
        return known

    # What is shown of one

    def network(self, network: NetworkId, reported: Reported) -> Json:
        """As the view of a host's admin API, and its hosts and revision; `NotFound` otherwise."""
        known = read_network(self.state.value, network)
        if known is None or not self._shares(known[0].record.get("project")):
            raise no_such("network", network)
        item = f"network/{network}"
        hosts = sorted(self.state.hosts_with(item))
        failed = [
            f"host {host}: {why}" for host in hosts if (why := _failure(reported, host, {item}))
        ]
        return {
            "record": known[0].record,
            "source": _SOURCE,
            "instances": self.state.count_with(item),
            "serving": not failed,
            "left_out": LeftOut(network, "not-in-force", failed[0]) if failed else None,
            "hosts": hosts,
            "revision": known[1],
        }

    def instance(
        self, instance: InstanceId, reported: Reported, user_data: bytes | None = None
    ) -> Json:
        """The same of an instance; of its user data what is given."""
        stored, revision = self.stored(instance)
        record = record_of(stored)
        shown: Json = render_record(record)
        if user_data is not None:
            shown = render_record(_with_data(record, user_data))
        items = {f"instance/{instance}", *(f"network/{one.network}" for one in record.ports)}
        pending = [
            f"host {host}: {why}"
            for host in stored.hosts
            if (why := _pending(reported, host, items))
        ]
        return {
            "record": shown,
            "ec2_id": record.ec2_id,
            "uuid": record.uuid,
            "source": _SOURCE,
            "revision": str(revision),
            "conflicts": [],
            "pending": pending,
            "hosts": list(stored.hosts),
        }

    def summary(self, instance: InstanceId, reported: Reported) -> Json:
        """The same without payloads."""
        stored, _ = self.stored(instance)
        shape = self.instance(instance, reported)
        vendor_data = record_of(stored).vendor_data
        shape["record"].pop("vendor_data", None)
        size = 0 if stored.user_data is None else stored.user_data.size
        return {**shape, "user_data_bytes": size, "vendor_data_bytes": len(vendor_data or b"")}

    def search(self, text: str, network: NetworkId | None) -> list[InstanceId]:
        """The ids of all instances that match, in order; see `core.matching.matcher`."""
        matches = matcher(text)
        found = []
        for instance, stored, _ in self.instances(network):
            try:
                if matches is None or matches(record_of(stored)):
                    found.append(instance)
            except SourceCorrupt:
                continue  # `fleet status` has it
        return found


def _with_data(record: Instance, user_data: bytes) -> Instance:
    return replace(record, user_data=user_data)


def _pending(reported: Reported, host: HostId, items: set[str]) -> str | None:
    return _failure(reported, host, items) if host in reported else NOT_CONNECTED


def _failure(reported: Reported, host: HostId, items: set[str]) -> str | None:
    known = reported.get(host, {})
    failed = [f"{item}: {why}" for item, why in known.get("failed", {}).items() if item in items]
    return "; ".join(failed) or None
