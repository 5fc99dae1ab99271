"""From the inventory to what the data plane must hold: map entries, binds, sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import ip_address

from imdsproxy.core.addresses import link_local_of, text_of
from imdsproxy.core.identity import Learned, holds, port_at
from imdsproxy.core.inventory import Inventory
from imdsproxy.core.model import Instance, InstanceId, NetworkId, Upstream
from imdsproxy.core.nova import NovaRouting
from imdsproxy.core.observation import AddressKey, Conflict
from imdsproxy.core.path_rules import PathRules, set_id
from imdsproxy.core.policy import NO_RULES, PolicyBook, PolicyPlace
from imdsproxy.core.wire import MAP_CONFLICT, EmbeddedRecord, MapRecord, render_map_value


@dataclass(frozen=True, slots=True)
class PlannedRecords:
    """What HAProxy's maps are to say.

    Attributes:
        values: Of records, by map key; `None` where there is to be none.
        sets: The path rules that they refer to, by id (`core.path_rules.set_id`).
    """

    values: dict[str, str | None]
    sets: dict[str, PathRules]


def record_key(key: AddressKey) -> str:
    """The map key of one (network, address): the bind's name, a slash, the address as HAProxy prints it."""
    network, address = key
    return f"{network}/{text_of(address)}"


def parse_record_key(key: str) -> AddressKey | None:
    """The reverse of `record_key`; `None` for what is none of ours."""
    network, _, address = key.rpartition("/")
    try:
        return NetworkId(network), ip_address(address)
    except ValueError:
        return None


@dataclass(frozen=True, slots=True)
class RecordPlanner:
    """Says what the data plane must know of addresses.

    Attributes:
        inventory: Everything known.
        revisions: The compiled record of each instance whose documents are ours; one that has none cannot be
            served yet.
        learned: Addresses that something else than a record gave to an instance.
        routing: Where requests go whose documents Nova has.
        policies: What settings and operators say of guests.
    """

    inventory: Inventory
    revisions: Mapping[InstanceId, str]
    learned: Mapping[AddressKey, Learned]
    routing: NovaRouting
    policies: PolicyBook = field(default_factory=PolicyBook)

    def plan_record(self, key: AddressKey) -> MapRecord | Conflict | None:
        """The record of one address, or `None` where the data plane must not know it."""
        guest = self._guest(key)
        return guest if guest is None or isinstance(guest, Conflict) else self._plan(key[0], *guest)

    def plan_records(self, keys: Iterable[AddressKey]) -> PlannedRecords:
        """`plan_record` for many addresses."""
        values: dict[str, str | None] = {}
        sets: dict[str, PathRules] = {}
        # An instance's addresses in one network mostly have the same record.
        shared: dict[tuple[InstanceId, NetworkId, str | None], str | None] = {}
        for key in keys:
            guest = self._guest(key)
            if guest is None or isinstance(guest, Conflict):
                values[record_key(key)] = None if guest is None else MAP_CONFLICT
                continue
            instance, project = guest
            place = instance.id, key[0], project
            if place not in shared:
                record = self._plan(key[0], instance, project)
                shared[place] = None if record is None else render_map_value(record)
                if record is not None and record.paths:
                    sets[set_id(record.paths)] = record.paths
            values[record_key(key)] = shared[place]
        return PlannedRecords(values, sets)

    def _guest(self, key: AddressKey) -> tuple[Instance, str | None] | Conflict | None:
        """Whose address it is, and the project of the port that has it."""
        owner, place = self.inventory.owner(key), key
        if isinstance(owner, Conflict):
            return owner
        if owner is None:
            entry = self.learned.get(key)
            if entry is None or not holds(self.inventory, key, entry):
                return None
            # Of an address that a MAC has, the port is the one with the MAC, as for the address that the MAC makes.
            by_mac = key if entry.mac is None else (key[0], link_local_of(entry.mac))
            owner, place = entry.instance, entry.via or by_mac
        instance = self.inventory.instances.get(owner)
        return None if instance is None else (instance, _project_at(instance, place))

    def _plan(
        self, network: NetworkId, instance: Instance, project: str | None
    ) -> MapRecord | None:
        place = policy_place(self.inventory, network, project, instance)
        word, paths = self.policies.word(place, instance.created_at)
        if instance.upstream is not Upstream.NOVA:
            revision = self.revisions.get(instance.id)
            if revision is None:
                return None
            return EmbeddedRecord(instance.id, revision, word, paths)
        record = None if project is None else self.routing.record(network, instance.id, project)
        return replace(record, policy=word, paths=paths) if record and word else record


def policy_place(
    inventory: Inventory, network: NetworkId, project: str | None, instance: Instance
) -> PolicyPlace:
    """The scopes whose policies apply to an instance.

    Args:
        inventory: Everything known.
        network: The listener's, or the router whose guests it has.
        project: The port's.
        instance: Whose address it is.
    """
    known = inventory.networks.get(network)
    of_network = NO_RULES if known is None else known.policy
    return PolicyPlace(network, project, instance.id, of_network, instance.policy)


def _project_at(instance: Instance, place: AddressKey) -> str | None:
    """The project of the port that has the address."""
    network = place[0]
    projects = {one.project or instance.project for one in instance.ports if one.network == network}
    if len(projects) == 1:
        return projects.pop()
    port = port_at(instance, place)
    return None if port is None else port.project or instance.project
