"""A host's items of its fleet: revisions, records in force, policies and refusals. Pure.

An older version never replaces a newer one. An item that cannot be read, or that claims an address of another instance,
is refused, and its earlier version stays. A network leaves a host a while after its last instance: without the delay,
open connections get no answer at all. Until then guests get 404.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeAlias, cast

from imdsproxy.errors import Problem
from imdsproxy.fleet.codec import Json
from imdsproxy.fleet.guests import CLEARED, FleetPolicies
from imdsproxy.fleet.layout import UserData
from imdsproxy.fleet.stream import Batch, Hello, ItemKey, digest_items
from imdsproxy.model.claims import claim_places
from imdsproxy.model.entities import Instance, InstanceId, NetworkId, StoredBytes
from imdsproxy.model.observation import Observation
from imdsproxy.model.packed import PackedInstance
from imdsproxy.model.policy import NO_RULES, FleetRules, OperatorOverride
from imdsproxy.model.records import Path, Refused
from imdsproxy.model.records.levels import SCHEMA, Schema
from imdsproxy.model.tokens import KEY_BYTES, TokenKey
from imdsproxy.sources.in_force import Entry, InForce

Item: TypeAlias = tuple[int, Json]
"""Revision and value of an item."""

UserDataOf: TypeAlias = Callable[[InstanceId, str], "StoredBytes | None"]
"""Returns user data by instance and SHA-256; `None` if this host does not have it."""

_RECORDS: Final = {"network": "networks", "instance": "instances"}
_OF_HOST: Final = "policy/host"
_NOTHING_DAMAGED: Final[Mapping[ItemKey, bool]] = {}
_SHA256: Final = re.compile("[0-9a-f]{64}")
_REPAIR: Final = "another program changed it in etcd: write the whole record again"
_ACCEPT: Final = "compare the fleet with its backup, then `imdsproxy fleet accept-restore`"


@dataclass(frozen=True, slots=True)
class Position:
    """Position up to which a host has followed its fleet; `fleet` is `None` before the first complete set of items."""

    fleet: str | None = None
    incarnation: int = 0
    revision: int = 0


@dataclass(frozen=True, slots=True)
class Applied:
    """Result of applying a set of changes.

    Attributes:
        stored: Items to write to the copy on disk; `None` deletes an item.
        renumbered: Items that stay unchanged but get revision 0: their revision is from before the fleet's restore.
    """

    records: Observation
    stored: Mapping[ItemKey, Item | None]
    policies: bool
    renumbered: tuple[ItemKey, ...] = ()


class _Unreadable(ValueError):
    """Value of an item that this version cannot read."""


class _Later(_Unreadable):
    """Instance that waits for its user data, or for a readable version of the items that limit it."""


@dataclass(slots=True)
class FleetKnown:
    """All items of this host, by revision.

    `held` has items that stay in force although the hub cannot vouch for them, with reasons.
    """

    user_data: UserDataOf
    schema: Schema = SCHEMA
    position: Position = field(default_factory=Position)
    items: dict[ItemKey, int] = field(default_factory=dict)
    held: dict[ItemKey, str] = field(default_factory=dict)
    _unreadable: set[ItemKey] = field(default_factory=set)
    _refused: dict[ItemKey, Problem] = field(default_factory=dict)
    _waiting: dict[ItemKey, Item] = field(default_factory=dict)
    _lacking: dict[ItemKey, Item] = field(default_factory=dict)
    _others: dict[ItemKey, Any] = field(default_factory=dict, repr=False)
    _kinds: dict[str, InForce[Any]] = field(init=False)

    def __post_init__(self) -> None:
        self._kinds = {
            "networks": InForce(lambda _: (), lambda entry: _where("networks", entry)),
            "instances": InForce(_claims, lambda entry: _where("instances", entry)),
        }

    # State

    def hello(self) -> Hello:
        """Return the greeting for a hub: this host's position, items and operator overrides."""
        at = self.position
        overrides = {
            InstanceId(key.partition("/")[2]): override
            for key, override in self._others.items()
            if isinstance(override, OperatorOverride)
        }
        items, level = dict(self.items), self.schema.level
        return Hello(at.fleet, at.incarnation, at.revision, items, level=level, overrides=overrides)

    def digest(self, without: Collection[ItemKey]) -> str:
        """Return `digest_items` of the items in force, except `without`."""
        return digest_items({key: one for key, one in self.items.items() if key not in without})

    def everything(self) -> Observation:
        return Observation.of_changes(*(one.records for one in self._kinds.values()))

    def policies(self) -> FleetPolicies:
        others: dict[str, dict[str, Any]] = {
            "override": {},
            "keys": {},
            "password": {},
            "policy": {},
            "issuer": {},
        }
        for key, value in self._others.items():
            kind, _, name = key.partition("/")
            others[kind][name] = value
        of_scope = others["policy"]
        hosts = (rules for name, rules in of_scope.items() if name.startswith("host/"))
        return FleetPolicies(
            FleetRules(
                of_scope.get("fleet", NO_RULES),
                next(hosts, NO_RULES),
                {
                    name.removeprefix("project/"): rules
                    for name, rules in of_scope.items()
                    if name.startswith("project/")
                },
                others["issuer"].get("keys", 0),
            ),
            others["override"],
            {InstanceId(name): one for name, one in others["keys"].items()},
        )

    def passwords(self) -> dict[InstanceId, bytes | None]:
        """Return the fleet's password of each instance here, in the form of `fleet.guests.plan_password`."""
        names = (key.partition("/")[2] for key in self.items if key.startswith("instance/"))
        return {InstanceId(name): self._others.get(f"password/{name}") for name in names}

    def failed(self) -> dict[ItemKey, str]:
        """Return refused items with reasons; their earlier versions, if any, stay in force."""
        found = {key: str(problem) for key, problem in self._refused.items()}
        for kind, problem in self._clashes():
            key = f"{kind}/{problem.record}"
            if key in self._waiting:
                found.setdefault(key, problem.reason)
        return found

    def problems(self) -> tuple[Problem, ...]:
        held = (
            Problem(
                key,
                f"held: {why}; the item stays in force",
                _REPAIR if key in self._unreadable else _ACCEPT,
                record=key.partition("/")[2],
            )
            for key, why in sorted(self.held.items())
        )
        refused = (self._refused[key] for key in sorted(self._refused))
        return (*refused, *(problem for _, problem in self._clashes()), *held)

    def _clashes(self) -> Iterator[tuple[str, Problem]]:
        for kind, listed in _RECORDS.items():
            for problem in self._kinds[listed].problems():
                yield kind, problem

    # Changes

    def load(
        self,
        position: Position,
        items: Mapping[ItemKey, Item],
        damaged: Mapping[ItemKey, bool] = _NOTHING_DAMAGED,
    ) -> None:
        """Restore the items from before a restart. The hub sends missing ones again.

        An instance is refused if an item that limits its readers cannot be read. `damaged` has the keys of items whose
        copy on disk is damaged, and whether the key itself is intact.
        """
        self.position = position
        missing: set[ItemKey | None] = set()
        for key, is_whole in damaged.items():
            self._refuse(key, 0, "its copy on disk is damaged")
            missing.add(_limit(key) if is_whole else None)
        for key, (revision, value) in sorted(items.items(), key=_limits_first):
            if missing & _limits_of(key, value):
                self._refuse(key, revision, "an item that limits the instance cannot be read")
                continue
            try:
                self._load_item(key, revision, value)
            except _Unreadable as error:
                self._refuse(key, revision, str(error))
                missing.add(_limit(key))
            else:
                self.items[key] = revision

    def _load_item(self, key: ItemKey, revision: int, value: Json) -> None:
        kind = key.partition("/")[0]
        if kind not in _RECORDS:
            self._others[key] = self._parse_other(kind, value, None)
            return
        entry = self._entry(key, revision, value)
        if entry.problems:
            raise _Unreadable(str(entry.problems[0]))
        self._kinds[_RECORDS[kind]].prime(entry)

    def missing_user_data(self, batch: Batch | None = None) -> frozenset[UserData]:
        """Return missing user data of a batch's items, or, without a batch, of items refused for lack of data."""
        items = self._lacking if batch is None else batch.put
        found = (_user_data_of(key, value) for key, (_, value) in items.items())
        return frozenset(
            data for owner, data in found if data and self.user_data(owner, data.sha256) is None
        )

    def needed_user_data(self) -> frozenset[str]:
        """Return SHA-256 of user data that items lack, or lacked until it arrived: no stored item names it yet."""
        found = (_user_data_of(key, value) for key, (_, value) in self._lacking.items())
        return frozenset(data.sha256 for _, data in found if data)

    def explain_lacking(self, reasons: Mapping[str, str]) -> None:
        """Refuse items that lack user data with the reason, by SHA-256, why the data could not be fetched."""
        for key, (revision, value) in self._lacking.items():
            _, data = _user_data_of(key, value)
            if data and data.sha256 in reasons:
                self._refuse(key, revision, reasons[data.sha256])

    def supplied(self) -> Batch:
        """Return a batch of items that were refused for lack of data and now have their user data and limits."""
        put: dict[ItemKey, Item] = {}
        for key, (revision, value) in self._lacking.items():
            owner, data = _user_data_of(key, value)
            lacks_data = data is not None and self.user_data(owner, data.sha256) is None
            if not (lacks_data or self._lacks_limit(key, value)):
                put[key] = revision, value
        at = self.position
        return Batch(at.revision, at.fleet or "", at.incarnation, put)

    def apply(self, batch: Batch, *, whole: bool) -> Applied:
        """Apply a set of changes that is not older than this host's incarnation and revision.

        If the set is the `whole` answer to `hello`, no other item is held or refused.
        """
        newer = batch.incarnation > self.position.incarnation
        stored: dict[ItemKey, Item | None] = {}
        others = False
        if whole:
            self.held.clear()
            self._forget_refused(batch, stored)
        for key in (*batch.remove, *(batch.held if newer else ())):
            others |= self._remove(key)
            stored[key] = None
        for key, (revision, value) in sorted(batch.put.items(), key=_limits_first):
            known = self.items.get(key, -1)
            self.held.pop(key, None)
            if revision < known and not newer:
                self._refuse(key, revision, f"revision {known} is in force already")
            elif revision != known or newer or key in self._refused:
                others |= self._take(key, revision, value, stored)
        unread = {
            key: f"unreadable: {why}" for key, why in batch.unreadable.items() if key in self.items
        }
        if not newer:
            self.held.update((key, why) for key, why in batch.held.items() if key in self.items)
        self.held |= unread
        self._unreadable = {*unread, *(self._unreadable & self.held.keys())}
        renumbered = tuple(unread) if newer else ()
        self.items |= dict.fromkeys(renumbered, 0)
        self.position = Position(batch.fleet, batch.incarnation, batch.revision)
        changes = {kind: in_force.settle() for kind, in_force in self._kinds.items()}
        self._accept_waiting(stored)
        moves = self._kinds["instances"].moved
        records = Observation.of_changes(**changes, moves=moves)
        return Applied(records, stored, others, renumbered)

    def _take(
        self, key: ItemKey, revision: int, value: Json, stored: dict[ItemKey, Item | None]
    ) -> bool:
        """Apply an item. Return whether an item other than a record changed."""
        self._refused.pop(key, None)
        self._lacking.pop(key, None)
        kind, _, _ = key.partition("/")
        try:
            if kind in _RECORDS:
                if self._lacks_limit(key, value):
                    raise _Later("an item that limits the instance cannot be read")
                entry = self._entry(key, revision, value)
                self._kinds[_RECORDS[kind]].replace_file(key, [entry])
                self._waiting[key] = revision, value
                return False
            before = self._others.get(key)
            found = self._parse_other(kind, value, before)
        except _Unreadable as error:
            self._refuse(key, revision, str(error))
            if isinstance(error, _Later):
                self._lacking[key] = revision, value
            return False
        self._others[key], self.items[key] = found, revision
        if isinstance(found, OperatorOverride):
            # Store the merged value: the copy on disk must not undo a revocation.
            value = {"epoch": found.epoch, "reopened_at": found.reopened_at}
        elif isinstance(found, int):
            value = {"replaced": found}
        stored[key] = revision, value
        return found != before

    def _parse_other(self, kind: str, value: Json, before: object) -> object:
        return _parse_other(self.schema, kind, value, before)

    def _lacks_limit(self, key: ItemKey, value: Json) -> bool:
        """Return whether an item that limits an instance has no readable version."""
        if not self._refused:
            return False
        refused = {_limit(one) for one in self._refused if one not in self.items}
        return bool(refused and refused & _limits_of(key, value))

    def _remove(self, key: ItemKey) -> bool:
        kind = key.partition("/")[0]
        for mapping in (self.items, self.held, self._refused, self._waiting, self._lacking):
            cast("dict[ItemKey, object]", mapping).pop(key, None)
        if kind in _RECORDS:
            self._kinds[_RECORDS[kind]].replace_file(key, [])
            return False
        return self._others.pop(key, None) is not None

    def _forget_refused(self, batch: Batch, stored: dict[ItemKey, Item | None]) -> None:
        """Forget refused items that are missing in the batch: the hub would have sent them again."""
        for key in {*self._refused, *self._waiting, *self._lacking}.difference(batch.put):
            if key not in self.items:
                self._remove(key)
                stored[key] = None
                continue
            for mapping in (self._refused, self._waiting, self._lacking):
                cast("dict[ItemKey, object]", mapping).pop(key, None)
            kind, _, name = key.partition("/")
            held = self._kinds[_RECORDS[kind]].entry_of(name) if kind in _RECORDS else None
            if held is not None:
                self._kinds[_RECORDS[kind]].replace_file(key, [held])

    def _accept_waiting(self, stored: dict[ItemKey, Item | None]) -> None:
        for key, (revision, value) in tuple(self._waiting.items()):
            kind, _, name = key.partition("/")
            held = self._kinds[_RECORDS[kind]].entry_of(name)
            if held is not None and held.position == revision:
                self.items[key] = revision
                stored[key] = revision, value
                del self._waiting[key]

    def _refuse(self, key: ItemKey, revision: int, reason: str) -> None:
        note = "the version before it stays in force" if key in self.items else ""
        name = key.partition("/")[2]
        self._refused[key] = Problem(key, reason, note, _place(key, revision), record=name)

    def _entry(self, key: ItemKey, revision: int, value: Json) -> Entry[Any]:
        """Parse a record into an entry whose file is the item's key and whose position is the revision."""
        kind, _, name = key.partition("/")
        unknown = sorted(value.keys() - {"record", "user_data"})
        if unknown:
            raise _Unreadable(f"this version does not know {', '.join(unknown)}")
        found = self.schema.tables[kind].read(value.get("record"), (_RECORDS[kind], name))
        if not isinstance(found, Refused) and found.id != name:
            found = Refused((Problem("id", f"the record belongs to {found.id}"),))
        if isinstance(found, Refused):
            place = _place(key, revision)
            problems = tuple(replace(one, file=place) for one in found.problems)
            return Entry(name, key, revision, problems=problems)
        if not isinstance(found, Instance):
            return Entry(name, key, revision, record=found)
        if value.get("user_data") is not None:
            _, data = _user_data_of(key, value)
            if data is None:
                raise _Unreadable("`user_data` does not say `sha256` and `size`")
            stored = self.user_data(found.id, data.sha256)
            if stored is None:
                raise _Later("its user data has not arrived yet")
            found = replace(found, user_data=stored)
        return Entry(name, key, revision, record=PackedInstance.of(found))


def _user_data_of(key: ItemKey, value: Json) -> tuple[InstanceId, UserData | None]:
    kind, _, name = key.partition("/")
    match value.get("user_data") if kind == "instance" else None:
        case {"sha256": str(sha256), "size": int(size)} if _SHA256.fullmatch(sha256):
            return InstanceId(name), UserData(sha256, size)
        case _:
            return InstanceId(name), None


def _limits_first(item: tuple[ItemKey, Item]) -> tuple[bool, ItemKey]:
    return item[0].startswith("instance/"), item[0]


def _limit(key: ItemKey) -> ItemKey:
    """Return the item's key in the form of `_limits_of`: a host gets only its own host policy."""
    return _OF_HOST if key.startswith(f"{_OF_HOST}/") else key


def _limits_of(key: ItemKey, value: Json) -> set[ItemKey | None]:
    """Return the items that limit an instance's readers, with `None` for an unknown key; empty for other items."""
    kind, _, name = key.partition("/")
    record = value.get("record")
    if kind != "instance" or not isinstance(record, dict):
        return set()
    ports = record.get("ports")
    owned = [record, *(ports if isinstance(ports, list) else ())]
    projects = {f"policy/project/{one.get('project')}" for one in owned if isinstance(one, dict)}
    return {None, f"override/{name}", f"keys/{name}", "policy/fleet", _OF_HOST, *projects}


def merge(before: Batch | None, batch: Batch) -> Batch:
    """Merge two consecutive sets of changes of the same incarnation."""
    if before is None:
        return batch
    gone = frozenset(batch.remove)
    put = {key: item for key, item in before.put.items() if key not in gone} | dict(batch.put)
    remove = (*(key for key in before.remove if key not in batch.put), *batch.remove)
    held, unreadable = (
        {key: why for key, why in one.items() if key not in gone and key not in batch.put}
        for one in (before.held, before.unreadable)
    )
    return replace(
        batch,
        put=put,
        remove=tuple(dict.fromkeys(remove)),
        held=held | dict(batch.held),
        unreadable=unreadable | dict(batch.unreadable),
    )


def _parse_other(schema: Schema, kind: str, value: Json, before: object) -> object:
    match kind, value:
        case "policy", _:
            rules = schema.tables[kind].read(value)
            if isinstance(rules, Refused):
                raise _Unreadable("; ".join(map(str, rules.problems)))
            return rules
        case "override", {"epoch": int(epoch), "reopened_at": int(reopened_at)}:
            # Neither value ever decreases, whatever backup a fleet was restored from.
            known = before if isinstance(before, OperatorOverride) else OperatorOverride()
            return OperatorOverride(max(epoch, known.epoch), max(reopened_at, known.reopened_at))
        case "issuer", {"replaced": int(replaced)}:
            return max(replaced, before) if isinstance(before, int) else replaced
        case "password", {"password": None}:
            return CLEARED
        case "password", {"password": str(password)}:
            return _decode(password, "a password")
        case "keys", {"current": str(current), "keys": dict(keys)}:
            return _parse_keys(current, keys)
        case _:
            raise _Unreadable(f"this version cannot read such an item of kind {kind}")


def _decode(text: str, what: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        # The exception's cause would show a part of the secret.
        raise _Unreadable(f"{what} is no base64") from None


def _parse_keys(current: str, keys: Mapping[str, object]) -> tuple[TokenKey, ...]:
    found: dict[str, TokenKey] = {}
    for kid, text in keys.items():
        secret = _decode(str(text), "a key")
        if len(secret) != KEY_BYTES:
            raise _Unreadable(f"a key is not {KEY_BYTES} bytes long")
        found[kid] = TokenKey(secret)
    if current not in found:
        raise _Unreadable("its key in force is missing")
    return (found.pop(current), *found.values())


def _claims(instance: PackedInstance) -> list[Any]:
    return [address for address, _ in claim_places(instance.open())]


def _where(listed: str, entry: Entry[Any]) -> tuple[Path, str]:
    return (listed, entry.id), _place(entry.file, entry.position)


def _place(key: ItemKey, revision: int) -> str:
    return f"{key} at revision {revision}"


@dataclass(slots=True)
class LeavingNetworks:
    stay_s: float
    _until: dict[NetworkId, float] = field(default_factory=dict)

    def delay(self, changes: Observation, now: float) -> Observation:
        """Return the changes without removed networks; `due` returns those later.

        If a network is added or changed, all leaving networks are removed at once: it may take over a listener.
        """
        gone = dict.fromkeys(changes.networks_removed, now + self.stay_s)
        if not changes.networks and self.stay_s:
            self._until |= gone
            return replace(changes, networks_removed=())
        gone |= self._until
        self._until.clear()
        removed = tuple(one for one in gone if one not in changes.networks)
        return replace(changes, networks_removed=removed)

    def due(self, now: float) -> Observation:
        over = tuple(one for one, until in self._until.items() if until <= now)
        for one in over:
            del self._until[one]
        return Observation(networks_removed=over)
