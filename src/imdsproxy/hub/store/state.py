"""Copy of a fleet's records in memory, and the subset for each host.

The copy holds the values as stored in etcd and parses them again when a host needs them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from sys import intern
from typing import Any, Final, TypeAlias

from imdsproxy.fleet import codec, layout
from imdsproxy.fleet.codec import Json, Unreadable
from imdsproxy.fleet.layout import (
    ANYWHERE,
    HostId,
    HostState,
    Meta,
    SealedKeys,
    Sealing,
    StoredHost,
    StoredInstance,
    StoredIssuer,
    StoredNetwork,
    StoredPassword,
    StoredPolicy,
    Value,
    host_key,
    parse_host,
    parse_password,
    parse_sealing,
    parse_value,
    read_host,
)
from imdsproxy.fleet.restores import (
    EPOCHS,
    LASTING,
    MOST_AHEAD,
    is_lasting,
    join_overrides,
    join_values,
    read_suspicion,
)
from imdsproxy.fleet.stream import Batch, Bye, ByeCode, Hello, ItemKey, digest_items
from imdsproxy.hub.store.etcd_messages import Deleted, KeyValue
from imdsproxy.model.claims import listener_place
from imdsproxy.model.entities import InstanceId, Network, NetworkId
from imdsproxy.model.policy import OperatorOverride
from imdsproxy.model.records import parse_network

Item: TypeAlias = tuple[int, Json]
"""Revision and value of an item."""

InstanceKeys: TypeAlias = "Callable[[layout.View, InstanceId], Item | None]"
"""Function that returns an instance's token keys as an item; `None` while the hub can read no token keys."""

_FLEET_POLICY: Final = "policy/fleet"
_ISSUER_KEYS: Final = "issuer/keys"
_OF_ALL: Final = (_FLEET_POLICY, _ISSUER_KEYS)
"""Items of every host."""

_KINDS: Final[Mapping[str, str]] = {
    "network": layout.NETWORKS,
    "instance": layout.INSTANCES,
    "override": layout.OVERRIDES,
    "password": layout.PASSWORDS,
    "policy": layout.POLICIES,
    "issuer": layout.ISSUERS,
}
_SWEPT: Final = (layout.INSTANCES, layout.NETWORKS, layout.POLICIES, layout.PASSWORDS)
_DAY_S: Final = 86_400
"""Maximum lead of a hub's clock when it reopens a boot; a later time is refused."""

_OF_INSTANCE: Final = ("instance", "override", "keys", "password")
_NEEDED: Final = ("network/", "policy/")
"""Prefixes of the items that hosts get because their instances need them."""


@dataclass(frozen=True, slots=True)
class Change:
    """New value of a key, `None` if the key was deleted, with the numbers of `etcd_messages.KeyValue`, 0 if unknown."""

    key: str
    value: bytes | None
    mod_revision: int
    create_revision: int = 0
    version: int = 0


def change_of(event: KeyValue | Deleted) -> Change:
    if isinstance(event, Deleted):
        return Change(event.key, None, event.mod_revision)
    return Change(event.key, event.value, event.mod_revision, event.create_revision, event.version)


@dataclass(frozen=True, slots=True)
class _Entry:
    value: bytes
    mod_revision: int
    version: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Unread:
    """Unreadable value of a key in etcd, with the reason."""

    value: bytes
    mod_revision: int
    why: str


@dataclass(frozen=True, slots=True)
class _Placement:
    """Hosts of an instance, and the shared items that it needs: networks and policies of projects."""

    hosts: tuple[HostId, ...] = ()
    needs: tuple[ItemKey, ...] = ()
    sha256: str | None = None
    left: tuple[HostId, ...] = ()


_NOWHERE: Final = _Placement()


@dataclass(frozen=True, slots=True)
class Difference:
    """Answer to a host's hello: changes, and the items that the host keeps for a reason.

    `suspicious` is a reason to suspect that etcd was restored: an item of the host that etcd lacks or has in an older
    revision. Unreadable values do not count.
    """

    batch: Batch
    suspicious: str | None = None


@dataclass(slots=True)
class FleetState:
    """All keys below `layout.PREFIX`, as of `revision`.

    A key is readable, removed (its value says so), absent, or unreadable. An unreadable key keeps its last good value,
    if this hub has one, and never counts as absent.

    Args:
        keys_problem: Returns the reason why this hub cannot open the newest token keys.
        open_password: Decrypts a password, given its key and the sealed bytes; returns `None` on failure.

    Attributes:
        lost: Reasons by key, for keys that were deleted or got an older value. The value from before stays in force.
        ahead: Revisions of lasting keys of which etcd has an older value or none (0). The newest value stays in force.
        doubted: This hub has noticed a restore that no operator has accepted.
        removed: Keys of removed records. They stay in etcd for a while, so that hosts learn about the removal.
    """

    keys_of: InstanceKeys = lambda _view, _instance: None
    keys_problem: Callable[[layout.View], str | None] = lambda _: None
    open_password: Callable[[str, bytes], str | None] = lambda _key, _sealed: None
    revision: int = 0
    meta: Meta = field(default_factory=lambda: Meta(""))
    unreadable: dict[str, Unread] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    ahead: dict[str, int] = field(default_factory=dict)
    doubted: bool = False
    removed: set[str] = field(default_factory=set)
    _entries: dict[str, dict[str, _Entry]] = field(default_factory=dict)
    _placements: dict[InstanceId, _Placement] = field(default_factory=dict)
    _placed: dict[HostId, set[InstanceId]] = field(default_factory=dict)
    _where: dict[ItemKey, Counter[HostId]] = field(default_factory=dict)
    _listeners: dict[NetworkId, str] = field(default_factory=dict)
    _sharing: dict[str, set[NetworkId]] = field(default_factory=dict)

    @property
    def problems(self) -> dict[str, str]:
        """Reasons by key why this hub does not use etcd's value: it is unreadable or `lost`."""
        unread = self.unreadable.items()
        found = {
            key: f"not readable: {one.why} (revision {one.mod_revision})" for key, one in unread
        }
        return found | self.lost

    def copy(self) -> FleetState:
        """Return an independent copy to change; `become` takes the changed copy over."""
        return replace(
            self,
            unreadable=dict(self.unreadable),
            lost=dict(self.lost),
            ahead=dict(self.ahead),
            removed=set(self.removed),
            _entries={kind: dict(entries) for kind, entries in self._entries.items()},
            _placements=dict(self._placements),
            _placed={host: set(placed) for host, placed in self._placed.items()},
            _where={item: Counter(hosts) for item, hosts in self._where.items()},
            _listeners=dict(self._listeners),
            _sharing={where: set(networks) for where, networks in self._sharing.items()},
        )

    def successor(self) -> FleetState:
        """Return an empty state to load from etcd after an acceptance; it keeps the lasting values only."""
        next_state = FleetState(self.keys_of, self.keys_problem, self.open_password)
        next_state.remember(
            {key: entry.value for kind in LASTING for key, entry in self._kin(kind).items()}
        )
        return next_state

    def remember(self, values: Mapping[str, bytes]) -> None:
        """Load lasting values from before a restart or an acceptance, which etcd may have lost."""
        for key, value in values.items():
            self._kin(key)[key] = _Entry(value, 0)
            self.ahead[key] = 0

    def regain(self, other: FleetState) -> None:
        """Join lasting values that the other state received since this state was created."""
        for kind in LASTING:
            for key, entry in other._kin(kind).items():
                mine = self._kin(key).get(key)
                joined = entry.value if mine is None else join_values(key, entry.value, mine.value)
                if mine is None or joined != mine.value:
                    revision = 0 if mine is None else mine.mod_revision
                    self._kin(key)[key] = _Entry(joined, max(revision, entry.mod_revision))
                    self.ahead.setdefault(key, revision)

    def become(self, other: FleetState) -> None:
        """Replace all fields by the other state's; the other state must not be used afterwards."""
        for one in fields(self):
            setattr(self, one.name, getattr(other, one.name))

    def differs(self, change: Change, newest: int) -> bool:
        """Return whether a key differs from `change`, unless its value here is newer than revision `newest`."""
        entry = self.unreadable.get(change.key) or self._kin(change.key).get(change.key)
        if entry is None:
            return change.value is not None
        if entry.mod_revision > newest:
            return False
        return (entry.mod_revision, entry.value) != (change.mod_revision, change.value)

    def keys_beyond(self, found: Collection[str]) -> list[str]:
        return [key for key in self.keys(layout.PREFIX) if key not in found]

    def apply(self, revision: int, changes: Iterable[Change]) -> dict[HostId, set[ItemKey]]:
        """Apply changes that are complete up to `revision`; return items that may have changed, by host.

        Items for every host have the host `*`.
        """
        touched: dict[HostId, set[ItemKey]] = {}
        for change in changes:
            self._apply(change, touched)
        self.revision = max(self.revision, revision)
        return touched

    def _apply(self, change: Change, touched: dict[HostId, set[ItemKey]]) -> None:
        key = change.key
        entries = self._kin(key)
        before = entries.get(key)
        if change.value is None:
            self.unreadable.pop(key, None)
            if before is not None and is_lasting(key):
                self.ahead[key] = 0
            elif before is None or _may_go(key, before.value):
                entries.pop(key, None)
                self.removed.discard(key)
                if key.startswith(layout.INSTANCES):
                    self._placements.pop(InstanceId(key.removeprefix(layout.INSTANCES)), None)
            else:
                self.lost[key] = f"deleted at revision {change.mod_revision} by another program"
            return
        if before == _Entry(change.value, change.mod_revision) and key not in self.ahead:
            self.unreadable.pop(key, None)
            return
        try:
            found = parse_value(key, change.value)
            removed = key.startswith(_SWEPT) and layout.removal_time(change.value) is not None
        except Unreadable as error:
            self.unreadable[key] = Unread(change.value, change.mod_revision, str(error))
            # An unreadable value is not lost: an operator replaces it.
            self.ahead.pop(key, None)
            return
        self.unreadable.pop(key, None)
        if before is not None and is_lasting(key):
            self._join(change, change.value, before, touched)
            return
        why = None if before is None else _doubt_entry(key, before, change)
        if why is not None:
            self.lost[key] = why
            return
        self._fold(key, found, touched)
        self.lost.pop(key, None)
        entries[key] = _Entry(change.value, change.mod_revision, change.version)
        if removed:
            self.removed.add(key)
        else:
            self.removed.discard(key)

    def _join(
        self, change: Change, value: bytes, before: _Entry, touched: dict[HostId, set[ItemKey]]
    ) -> None:
        key, joined = change.key, join_values(change.key, before.value, value)
        # Hosts refuse an override of a lower revision than their own.
        revision = max(change.mod_revision, before.mod_revision)
        if joined != value:
            self.ahead[key] = change.mod_revision
        else:
            self.ahead.pop(key, None)
            if joined != before.value:
                revision = change.mod_revision
        # Hosts get the value again even if only its revision differs: digests compare revisions.
        if (joined, revision) != (before.value, before.mod_revision):
            self._fold(key, parse_value(key, joined), touched)
        self._kin(key)[key] = _Entry(joined, revision, change.version)

    def raise_overrides(
        self, host: HostId, overrides: Mapping[InstanceId, OperatorOverride], now: float
    ) -> list[str]:
        """Join overrides that a host has in force; return the keys of the overrides that etcd has lost.

        The host may be captured, so overrides count only for its own instances and only within plausible bounds.
        """
        raised: list[str] = []
        epochs, latest = (self.meta.incarnation + MOST_AHEAD) * EPOCHS, int(now) + _DAY_S
        for instance in sorted(overrides.keys() & self._placed.get(host, set())):
            key, override = layout.override_key(instance), overrides[instance]
            entry = self._kin(key).get(key)
            before = OperatorOverride() if entry is None else layout.parse_override(entry.value)
            joined = join_overrides(before, override)
            if joined == before or joined.epoch > epochs or joined.reopened_at > latest:
                continue
            revision = 0 if entry is None else entry.mod_revision
            self.ahead.setdefault(key, revision)
            self._kin(key)[key] = _Entry(layout.render_override(joined), revision)
            raised.append(key)
        return raised

    def _kin(self, key: str) -> dict[str, _Entry]:
        kind = key[: key.find("/", len(layout.PREFIX)) + 1]
        return self._entries.setdefault(kind, {})

    def _fold(self, key: str, found: Value, touched: dict[HostId, set[ItemKey]]) -> None:
        match found:
            case Meta():
                self.meta = found
            case StoredInstance():
                self._place(InstanceId(key.removeprefix(layout.INSTANCES)), found, touched)
            case StoredNetwork():
                self._listen(NetworkId(key.removeprefix(layout.NETWORKS)), found)
                self._touch(f"network/{key.removeprefix(layout.NETWORKS)}", touched)
            case StoredPassword() | OperatorOverride() | StoredPolicy() | StoredIssuer():
                self._touch(_item_of(key) or "", touched)
            case SealedKeys():
                for instance, placement in self._placements.items():
                    for host in placement.hosts:
                        touched.setdefault(host, set()).add(f"keys/{instance}")
            case _:
                pass

    def _listen(self, network: NetworkId, stored: StoredNetwork) -> None:
        where = self._listeners.pop(network, None)
        if where is not None:
            self._sharing[where].discard(network)
        read = parse_network(stored.record)
        if isinstance(read, Network):
            where = listener_place(read)[0]
            self._listeners[network] = where
            self._sharing.setdefault(where, set()).add(network)

    def _place(
        self, instance: InstanceId, stored: StoredInstance, touched: dict[HostId, set[ItemKey]]
    ) -> None:
        before = self._placements.get(instance, _NOWHERE)
        needs = needs_of(stored.record)
        own = _own_items(instance)
        data = stored.user_data
        sha256 = None if data is None else data.sha256
        now = _Placement(stored.hosts, needs, sha256, stored.left)
        for host in before.hosts:
            self._placed[host].discard(instance)
            touched.setdefault(host, set()).update(own, before.needs)
            for item in before.needs:
                there = self._where[item]
                there[host] -= 1
                if not there[host]:
                    del there[host]
                    if not there:
                        del self._where[item]
        for host in now.hosts:
            self._placed.setdefault(host, set()).add(instance)
            touched.setdefault(host, set()).update(own, needs)
            for item in needs:
                self._where.setdefault(item, Counter())[host] += 1
        self._placements[instance] = now

    def _touch(self, item: ItemKey, touched: dict[HostId, set[ItemKey]]) -> None:
        kind, _, rest = item.partition("/")
        if item in _OF_ALL:
            touched.setdefault(HostId("*"), set()).add(item)
        elif kind == "policy" and rest.startswith("host/"):
            touched.setdefault(HostId(rest.removeprefix("host/")), set()).add(item)
        for host in self._hosts(item):
            touched.setdefault(host, set()).add(item)

    def _hosts(self, item: ItemKey) -> Collection[HostId]:
        kind, _, rest = item.partition("/")
        if kind in _OF_INSTANCE:
            return self._placements.get(InstanceId(rest), _NOWHERE).hosts
        return self._where.get(item, ())

    # Items of hosts

    def reaches(self, host: HostId, item: ItemKey) -> bool:
        if item in {*_OF_ALL, f"policy/host/{host}"}:
            return True
        return host in self._hosts(item)

    def items_for(self, host: HostId) -> set[ItemKey]:
        """Return all items for a host, including items that etcd may not have."""
        found: set[ItemKey] = {*_OF_ALL, f"policy/host/{host}"}
        for instance in self._placed.get(host, ()):
            found.update(_own_items(instance), self._placements[instance].needs)
        return found

    def item(self, item: ItemKey) -> Item | None:
        """Return an item's revision and value; `None` if there is no value for hosts."""
        kind, _, rest = item.partition("/")
        if kind == "keys":
            return self.keys_of(self.value, InstanceId(rest))
        entry = self._entry(item)
        if entry is None:
            return None
        if kind == "password":
            return self._password(layout.PASSWORDS + rest, entry)
        value = codec.decode(entry.value)
        if kind == "instance":
            value = {key: value[key] for key in ("record", "user_data")}
        elif kind == "network":
            value = {"record": value["record"]}
        elif kind == "issuer":
            value = {"replaced": value["replaced"]}
        return entry.mod_revision, value

    def _password(self, key: str, entry: _Entry) -> Item | None:
        sealed = parse_password(entry.value).sealed
        opened = None if sealed is None else self.open_password(key, sealed)
        if sealed is not None and opened is None:
            return None
        return entry.mod_revision, {"password": opened}

    def _entry(self, item: ItemKey) -> _Entry | None:
        kind, _, rest = item.partition("/")
        if kind not in _KINDS:
            return None
        prefix = _KINDS[kind]
        return self._entries.get(prefix, {}).get(prefix + rest)

    def _revision_of(self, item: ItemKey) -> int | None:
        if item.startswith(("keys/", "password/")):
            found = self.item(item)
            return None if found is None else found[0]
        entry = self._entry(item)
        return None if entry is None else entry.mod_revision

    def size(self, item: ItemKey) -> int:
        """Return the size in bytes of an item's value in etcd; 0 if it is absent."""
        entry = self._entry(item)
        return 0 if entry is None else len(entry.value)

    def has_blob(self, host: HostId, sha256: str) -> bool:
        placed = self._placed.get(host, ())
        return any(self._placements[one].sha256 == sha256 for one in placed)

    def digest(self, host: HostId, without: Collection[ItemKey]) -> str:
        """Return `digest_items` of the items for a host, except those in `without`."""
        revisions: dict[ItemKey, int] = {}
        keys: int | None = None
        for item in self.items_for(host).difference(without):
            if not item.startswith("keys/"):
                revision = self._revision_of(item)
            else:
                # All instances' keys have the same revision, and deriving each one's keys is most of the work.
                revision = keys = self._revision_of(item) if keys is None else keys
            if revision is not None:
                revisions[item] = revision
        return digest_items(revisions)

    def changes_for(
        self, host: HostId, items: Iterable[ItemKey], *, keeps_unread: bool = False
    ) -> Batch:
        """Return a batch with the current values of changed items, for a host that is otherwise up to date.

        With `keeps_unread`, the host keeps unreadable instances, which may need items that no other instance needs.
        """
        put: dict[ItemKey, Item] = {}
        removed: list[ItemKey] = []
        for item in sorted(items):
            if not self.reaches(host, item):
                if not (keeps_unread and item.startswith(_NEEDED)):
                    removed.append(item)
            elif (found := self.item(item)) is not None:
                put[item] = found
        return self._batch(put, removed, {})

    def compare(self, host: HostId, hello: Hello) -> Difference | Bye:
        """Compare a host's items with the items for it; return the difference, or a refusal."""
        if (refused := self._refuse(hello)) is not None:
            return refused
        have, accepts = hello.items, self.meta.incarnation > hello.incarnation
        # While a restore is not accepted, items that the host removed since the backup do not come back.
        known_to = hello.revision if self.is_doubted() and not accepts else -1
        wanted = self.items_for(host)
        put: dict[ItemKey, Item] = {}
        held: dict[ItemKey, str] = {}
        unread: dict[ItemKey, str] = {}
        for item in sorted(wanted):
            revision, known = self._revision_of(item), have.get(item)
            if known is not None and (why := _doubt(revision, known)) is not None:
                reason = self.unread(item)
                (held if reason is None else unread)[item] = reason or why
            elif known is None and revision is not None and revision <= known_to:
                continue
            # A restored etcd assigns the same revisions again, so equal revisions prove nothing.
            elif (revision != known or accepts) and (found := self.item(item)) is not None:
                put[item] = found
        removed: list[ItemKey] = []
        for item in sorted(have.keys() - wanted, key=_instances_first):
            why = self._doubt_removal(host, item, have[item], held)
            if (reason := self._unread_with(item, why, unread)) is not None:
                unread[item] = reason
            elif why is None:
                removed.append(item)
            else:
                held[item] = why
        if accepts:
            older = ((item, self.item(item)) for item in held if item in wanted)
            put |= {item: found for item, found in older if found is not None}
            removed += [item for item in held if item not in put]
            held = {}
        first = next(iter(held), None)
        suspicious = first and f"{host} has {first} of revision {have[first]}: {held[first]}"
        batch = replace(self._batch(put, removed, held), unreadable=unread)
        return Difference(batch, suspicious)

    def is_doubted(self) -> bool:
        """Return whether hubs suspect a restore of etcd that no operator has accepted."""
        suspicion = None if self.doubted else read_suspicion(self.value)
        return self.doubted or (suspicion is not None and suspicion.refuses)

    def unread(self, item: ItemKey) -> str | None:
        """Return the reason why an item's value in etcd is unreadable; `None` if it is readable or absent."""
        kind, _, rest = item.partition("/")
        if kind == "keys":
            return self.unread_keys()
        found = self.unreadable.get(_KINDS[kind] + rest)
        if found is None and kind == "password" and self._entry(item) and not self.item(item):
            return "no key of this hub opens it"
        return None if found is None else found.why

    def unread_keys(self) -> str | None:
        """Return the reason why the newest token keys are unreadable, while the earlier keys are in force."""
        unread = self.unreadable.get(layout.TOKEN_KEYS)
        if unread is None:
            return self.keys_problem(self.value)
        return f"{layout.TOKEN_KEYS} was written by another program: {unread.why}"

    def unread_instances(self, items: Iterable[ItemKey]) -> frozenset[ItemKey]:
        return frozenset(
            one for one in items if one.startswith("instance/") and self.unread(one) is not None
        )

    def _unread_with(
        self, item: ItemKey, doubt: str | None, unread: Mapping[ItemKey, str]
    ) -> str | None:
        """Return the reason why unreadable instances keep an item on a host; `None` if they do not."""
        kind, _, rest = item.partition("/")
        if kind in {"override", "keys", "password"}:
            return unread.get(f"instance/{rest}")
        if kind == "instance":
            return None if doubt is None else self.unread(item)
        needed = any(one.startswith("instance/") for one in unread)
        return "instances that cannot be read may need it" if needed else None

    def _refuse(self, hello: Hello) -> Bye | None:
        """Return the refusal of a host of another fleet, or of one ahead of this hub; `None` for any other."""
        meta, seen = self.meta, hello.incarnation
        if hello.fleet not in {None, meta.fleet}:
            return Bye(ByeCode.OTHER_FLEET, f"this is fleet {meta.fleet}, not {hello.fleet}")
        if seen > meta.incarnation + MOST_AHEAD:
            why = f"incarnation {seen} is too far ahead of the fleet's {meta.incarnation}"
            return Bye(ByeCode.FORMAT, why)
        if seen > meta.incarnation:
            why = f"the fleet has incarnation {meta.incarnation}, and the host has seen {seen}"
            return Bye(ByeCode.AHEAD, why)
        if seen == meta.incarnation and hello.revision > self.revision:
            return Bye(ByeCode.BEHIND, f"this hub has revision {self.revision}")
        return None

    def _doubt_removal(
        self, host: HostId, item: ItemKey, known: int, held: Mapping[ItemKey, str]
    ) -> str | None:
        """Return the reason against removing an item from a host; `None` if etcd records the removal.

        A host that claims an item it never had gets the same answer whether the instance exists or not.
        """
        kind, _, rest = item.partition("/")
        if kind in {"override", "keys", "password"}:
            return held.get(f"instance/{rest}")
        if kind == "instance":
            left = self._placements.get(InstanceId(rest), _NOWHERE).left
            went = host in left or ANYWHERE in left
            revision = self._revision_of(item)
            certain = went and revision is not None and revision >= known
            return None if certain else "etcd has no record of its removal"
        needed = any(one.startswith("instance/") for one in held)
        return "instances that are held may need it" if needed else None

    def _batch(
        self, put: Mapping[ItemKey, Item], removed: Iterable[ItemKey], held: Mapping[ItemKey, str]
    ) -> Batch:
        meta = self.meta
        return Batch(self.revision, meta.fleet, meta.incarnation, put, tuple(removed), held)

    def held_back(self, host: HostId, items: Collection[ItemKey] | None) -> str | None:
        """Return the reason why a host does not get the newest value of an item, or of any of its items."""
        if not (self.unreadable or self.lost):
            return None
        for key, why in self.problems.items():
            item = _item_of(key)
            if item is None:
                continue
            if self.reaches(host, item) if items is None else item in items:
                return f"{item} is {why}"
        return None

    # Queries of operators and hubs

    def value(self, key: str) -> tuple[bytes, int] | None:
        """Return a key's last good value and its revision; `None` if there is none."""
        entry = self._kin(key).get(key)
        return None if entry is None else (entry.value, entry.mod_revision)

    def stored(self, key: str) -> tuple[bytes, int] | None:
        """Return a key's value in etcd, readable or not, and its revision; `None` if the key is absent."""
        found = self.unreadable.get(key)
        return self.value(key) if found is None else (found.value, found.mod_revision)

    def keys(self, prefix: str) -> Iterator[str]:
        """Iterate over the keys below a prefix, readable or not, looking only at kinds that match."""
        kinds = (
            kin
            for kind, kin in self._entries.items()
            if kind.startswith(prefix) or prefix.startswith(kind)
        )
        yield from (key for kin in kinds for key in kin if key.startswith(prefix))
        for key in self.unreadable:
            if key.startswith(prefix) and key not in self._kin(key):
                yield key

    def count_records(self, prefix: str) -> int:
        """Return the number of records of a kind, such as `layout.INSTANCES`, without removed records."""
        removed = sum(1 for key in self.removed if key.startswith(prefix))
        return len(self._kin(prefix)) - removed

    def sealing(self) -> Sealing | None:
        """Return the key with which hubs seal secrets, `None` if etcd names none; raise `Unreadable`."""
        found = self.value(layout.ENVELOPE) or self.stored(layout.ENVELOPE)
        return None if found is None else parse_sealing(found[0])

    def host(self, host: HostId) -> StoredHost | None:
        """Return a stored host, with state `UNREADABLE` if no good value is known; `None` if it is absent."""
        key = host_key(host)
        found = self.value(key)
        if found is not None:
            return parse_host(found[0])
        unread = self.unreadable.get(key)
        return None if unread is None else read_host(unread.value, unread.mod_revision)

    def enrolled(self) -> list[HostId]:
        found = (
            key.removeprefix(layout.HOSTS)
            for key, entry in self._kin(layout.HOSTS).items()
            if parse_host(entry.value).state is HostState.ENROLLED
        )
        return sorted(map(HostId, found))

    def hosts_of(self, instance: InstanceId) -> tuple[HostId, ...]:
        return self._placements.get(instance, _NOWHERE).hosts

    def instances_on(self, host: HostId) -> frozenset[InstanceId]:
        return frozenset(self._placed.get(host, ()))

    def count_placed(self) -> int:
        """Return the number of placements; an instance that moves counts for each of its hosts."""
        return sum(map(len, self._placed.values()))

    def blobs(self) -> set[str]:
        return {one.sha256 for one in self._placements.values() if one.sha256 is not None}

    def count_by_host(self, item: ItemKey) -> Counter[HostId]:
        """Count the instances that need an item, by host; an instance that moves counts for each of its hosts."""
        return Counter(self._where.get(item, Counter()))

    def count_on(self, host: HostId, item: ItemKey) -> int:
        there = self._where.get(item)
        return 0 if there is None else there.get(host, 0)

    def count_both(self, item: ItemKey, other: ItemKey) -> Counter[HostId]:
        hosts = self._where.get(item, Counter()).keys() & self._where.get(other, Counter()).keys()
        wanted = {item, other}
        placed = ((host, one) for host in hosts for one in self._placed[host])
        return Counter(host for host, one in placed if wanted <= {*self._placements[one].needs})

    def items_beside(self, host: HostId, item: ItemKey) -> set[ItemKey]:
        found: set[ItemKey] = set()
        for one in self._placed.get(host, ()):
            needs = self._placements[one].needs
            if item in needs:
                found.update(_own_items(one), needs)
        return found

    def placement(self, instance: InstanceId) -> tuple[tuple[HostId, ...], tuple[ItemKey, ...]]:
        found = self._placements.get(instance, _NOWHERE)
        return found.hosts, found.needs

    def networks_at(self, where: str) -> tuple[NetworkId, ...]:
        """Return the networks whose listeners share a device or namespace (`listener_place`)."""
        return tuple(self._sharing.get(where, ()))

    def hosts_with(self, item: ItemKey) -> frozenset[HostId]:
        return frozenset(self._hosts(item))


def _own_items(instance: InstanceId) -> tuple[ItemKey, ...]:
    return tuple(f"{kind}/{instance}" for kind in _OF_INSTANCE)


def _item_of(key: str) -> ItemKey | None:
    """Return the item of a key in etcd; `None` if hosts get none."""
    for kind, prefix in _KINDS.items():
        if key.startswith(prefix):
            return f"{kind}/{key.removeprefix(prefix)}"
    return None


def needs_of(record: Mapping[str, Any]) -> tuple[ItemKey, ...]:
    ports = record.get("ports", [])
    projects = (record.get("project"), *(port.get("project") for port in ports))
    found = {f"network/{port['network']}" for port in ports}
    found |= {f"policy/project/{one}" for one in projects if one is not None}
    return tuple(intern(one) for one in sorted(found))


def _doubt_entry(key: str, before: _Entry, change: Change) -> str | None:
    """Return the reason why a value cannot follow the known value in the same etcd; `None` if it can."""
    if change.value is None:
        return None
    if key == layout.META:
        return _doubt_meta(layout.parse_meta(change.value), layout.parse_meta(before.value))
    revision = change.mod_revision
    if revision < before.mod_revision:
        return f"of revision {revision}, after revision {before.mod_revision}"
    if revision == before.mod_revision:
        return f"different from before, at the same revision {revision}"
    # After a restore, a key may have been rewritten before this hub reads it.
    if change.create_revision <= before.mod_revision and 0 < change.version <= before.version:
        return f"of version {change.version}, after version {before.version}"
    return None


def _doubt_meta(now: Meta, before: Meta) -> str | None:
    if now.fleet != before.fleet:
        return f"of another fleet, {now.fleet}"
    if now.incarnation < before.incarnation:
        return f"of incarnation {now.incarnation}, after incarnation {before.incarnation}"
    return None


def _may_go(key: str, value: bytes) -> bool:
    """Return whether hubs or operators may delete a key: entries of hubs, the suspicion, and removed records."""
    if key.startswith((layout.HUBS, layout.KNOWN_HUBS)) or key == layout.SUSPECT:
        return True
    return key.startswith(_SWEPT) and layout.removal_time(value) is not None


def _instances_first(item: ItemKey) -> tuple[bool, ItemKey]:
    return not item.startswith("instance/"), item


def _doubt(revision: int | None, known: int) -> str | None:
    """Return the reason why etcd's revision of an item is older than a host's; `None` if it is not."""
    if revision is None:
        return "etcd no longer has the item"
    if revision < known:
        return f"etcd has revision {revision} of the item, which is older"
    return None
