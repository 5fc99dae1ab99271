"""Planner for the data plane: from the inventory to the records in HAProxy's maps."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import ip_address

from imdsproxy.model.addresses import link_local_of, text_of
from imdsproxy.model.entities import Instance, InstanceId, NetworkId, Upstream
from imdsproxy.model.identity import Learned, holds, port_at
from imdsproxy.model.inventory import Inventory
from imdsproxy.model.observation import AddressKey, Conflict, Expired
from imdsproxy.model.path_rules import PathRules, set_id
from imdsproxy.model.policy import (
    NO_RULES,
    Folded,
    PolicyBook,
    PolicyPlace,
    render_policy_word,
)
from imdsproxy.model.subject import Subject, plan_subject
from imdsproxy.model.wire import (
    MAP_CONFLICT,
    Beside,
    EmbeddedRecord,
    MapRecord,
    render_map_value,
)
from imdsproxy.nova.routing import NovaRouting


@dataclass(frozen=True, slots=True)
class GuestPolicy:
    """Policy in force for an instance in a network, and how HAProxy's maps refer to it."""

    folded: Folded
    word: str
    beside: Beside


@dataclass(frozen=True, slots=True)
class PlannedRecords:
    """Planned content of HAProxy's maps.

    Attributes:
        values: Records by map key; `None` for a key without a record.
        sets: Path rules to which the records refer, by id (`model.path_rules.set_id`).
        subjects: Subjects of identity tokens to which the records refer, by id.
    """

    values: dict[str, str | None]
    sets: dict[str, PathRules]
    subjects: dict[str, Subject]


def record_key(key: AddressKey) -> str:
    """Return the map key of one (network, address): the bind's name, a slash, the address as HAProxy prints it."""
    network, address = key
    return f"{network}/{text_of(address)}"


def parse_record_key(key: str) -> AddressKey | None:
    """Parse the result of `record_key`; `None` for a foreign key."""
    network, _, address = key.rpartition("/")
    try:
        return NetworkId(network), ip_address(address)
    except ValueError:
        return None


@dataclass(frozen=True, slots=True)
class RecordPlanner:
    """Planner of the data plane's records.

    Attributes:
        revisions: Revision of the compiled record of each instance that our document server serves. An instance without
            a revision cannot be served yet.
        learned: Addresses that were assigned to an instance without a record of the address.
        identity: Whether this host gives identity tokens.
        region: The settings' region, for signed documents.
    """

    inventory: Inventory
    revisions: Mapping[InstanceId, str]
    learned: Mapping[AddressKey, Learned]
    routing: NovaRouting
    policies: PolicyBook = field(default_factory=PolicyBook)
    identity: bool = False
    region: str | None = None

    def plan_record(self, key: AddressKey) -> MapRecord | Conflict | Expired | None:
        """Return the record of one address, or `None` if the data plane must not know the address."""
        guest = self._guest(key)
        return self._plan(key[0], *guest) if isinstance(guest, tuple) else guest

    def plan_records(self, keys: Iterable[AddressKey]) -> PlannedRecords:
        values: dict[str, str | None] = {}
        sets: dict[str, PathRules] = {}
        subjects: dict[str, Subject] = {}
        # If all of an instance's ports in a network have one project, their addresses have the same record.
        shared: dict[tuple[InstanceId, NetworkId, NetworkId], str | None] = {}
        for key in keys:
            guest = self._guest(key)
            if not isinstance(guest, tuple):
                # An expired instance also gets `MAP_CONFLICT`: HAProxy answers it with 503.
                values[record_key(key)] = None if guest is None else MAP_CONFLICT
                continue
            owner, place = guest
            alike = owner, key[0], place[0]
            if alike in shared:
                values[record_key(key)] = shared[alike]
                continue
            record = self._plan(key[0], owner, place)
            value = values[record_key(key)] = None if record is None else render_map_value(record)
            if record is not None and record.beside.paths:
                sets[set_id(record.beside.paths)] = record.beside.paths
            if record is not None and record.beside.subject is not None:
                subjects[record.beside.subject.id] = record.beside.subject
            instance = self.inventory.instances.get(owner)
            if instance is not None and len(_projects_in(instance, place[0])) == 1:
                shared[alike] = value
        return PlannedRecords(values, sets, subjects)

    def _guest(self, key: AddressKey) -> tuple[InstanceId, AddressKey] | Conflict | Expired | None:
        """Return the address's owner, and the address that identifies the owner's port."""
        owner = self.inventory.owner(key)
        if owner is not None:
            return (owner, key) if isinstance(owner, str) else owner
        entry = self.learned.get(key)
        if entry is not None and (expired := self.inventory.expired(entry.instance)) is not None:
            return expired
        if entry is None or not holds(self.inventory, key, entry):
            return None
        # If a MAC identifies the address, the port is found by the MAC's link-local address.
        by_mac = key if entry.mac is None else (key[0], link_local_of(entry.mac))
        return entry.instance, entry.via or by_mac

    def _plan(self, network: NetworkId, owner: InstanceId, place: AddressKey) -> MapRecord | None:
        instance = self.inventory.instances.get(owner)
        if instance is None:
            return None
        project = project_at(instance, place)
        in_force = self.find_policy(network, project, instance)
        word, beside = in_force.word, in_force.beside
        if instance.upstream is not Upstream.NOVA:
            revision = self.revisions.get(owner)
            return None if revision is None else EmbeddedRecord(owner, revision, word, beside)
        record = None if project is None else self.routing.record(network, owner, project)
        return replace(record, policy=word, beside=beside) if record and word else record

    def find_policy(
        self, network: NetworkId, project: str | None, instance: Instance
    ) -> GuestPolicy:
        """Return the policy in force for an instance in a network, by the project of the instance's port there."""
        folded = self.policies.fold(policy_place(self.inventory, network, project, instance))
        policy, override = folded.policy, self.policies.override(instance.id)
        subject = None
        if self.identity:
            subject = plan_subject(
                policy,
                override,
                instance,
                network,
                project,
                region=self.region,
                replaced_keys=self.policies.fleet.replaced_keys,
            )
        id_ = "" if subject is None else subject.id
        word = render_policy_word(policy, override, instance.created_at, id_)
        return GuestPolicy(folded, word, Beside(policy.paths, subject))


def policy_place(
    inventory: Inventory, network: NetworkId, project: str | None, instance: Instance
) -> PolicyPlace:
    known = inventory.networks.get(network)
    of_network = NO_RULES if known is None else known.policy
    return PolicyPlace(network, project, instance.id, of_network, instance.policy)


def project_at(instance: Instance, place: AddressKey) -> str | None:
    """Return the project of the port by which an instance has an address."""
    projects = _projects_in(instance, place[0])
    if len(projects) == 1:
        return projects.pop()
    port = port_at(instance, place)
    return None if port is None else port.project or instance.project


def _projects_in(instance: Instance, network: NetworkId) -> set[str | None]:
    return {port.project or instance.project for port in instance.ports if port.network == network}
