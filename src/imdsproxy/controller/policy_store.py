"""Policies in force: from settings, from operators' overrides of instances, and from a fleet.

An operator's override is on disk before it takes effect, and survives every restart.
"""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final, cast

from imdsproxy.config.schema import Settings
from imdsproxy.controller.token_keys import TokenKeys
from imdsproxy.errors import HostRefused
from imdsproxy.fleet.guests import FleetPolicies, join_fleet_overrides
from imdsproxy.host.clock import Clock
from imdsproxy.host.files import write_atomic
from imdsproxy.model.entities import InstanceId, NetworkId
from imdsproxy.model.inventory import Inventory
from imdsproxy.model.policy import OperatorOverride, PolicyBook
from imdsproxy.model.retired import Overrides, parse_retired
from imdsproxy.model.tokens import TTL_LIMIT_S
from imdsproxy.reconcile.part import Part

_FORMAT: Final = 3
_write: Final = partial(write_atomic, mode=0o600, durable=True)


def read_overrides(path: Path) -> tuple[Overrides, dict[str, int]]:
    """Read operators' overrides, and the times at which instances departed (Unix time). A missing file means none.

    Raises:
        HostRefused: The file cannot be read, or is damaged.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return Overrides(), {}
    except OSError as error:
        raise HostRefused(f"cannot read {path}: {error.strerror}") from error
    try:
        return _parse(data.decode())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        why = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        raise HostRefused(
            f"{path} is damaged: {why}",
            hint="it says whose tokens were revoked: from a backup, or remove it together with the token keys",
        ) from error


def _parse(text: str) -> tuple[Overrides, dict[str, int]]:
    head = cast("dict[str, object]", json.loads(text))
    if head["format"] != _FORMAT:
        raise ValueError(f"it is of format {head['format']}, not {_FORMAT}")
    instances = cast("dict[str, list[object]]", head["instances"])
    listed = {name: _override(name, *numbers) for name, numbers in instances.items()}
    departed = cast("dict[str, object]", head["departed"])
    times = {name: at for name, at in departed.items() if type(at) is int}
    if times != departed:
        raise ValueError("an instance went at something else than a time")
    return Overrides(listed, parse_retired(head["retired"])), times


def _override(name: str, epoch: object, reopened_at: object) -> OperatorOverride:
    if type(epoch) is not int or type(reopened_at) is not int or min(epoch, reopened_at) < 0:
        raise ValueError(f"instance {name} has something else than two numbers")
    return OperatorOverride(epoch, reopened_at)


@dataclass(frozen=True, slots=True)
class FleetChange:
    """Changes between two states of a fleet's policies.

    Attributes:
        rules: Rules changed; any guest may be affected.
        overrides: Instances whose override in force changed.
        keys: Token keys changed; HAProxy's keys need an update.
    """

    rules: bool = False
    overrides: frozenset[InstanceId] = frozenset()
    keys: bool = False

    def __bool__(self) -> bool:
        return self.rules or self.keys or bool(self.overrides)


@dataclass(slots=True)
class PolicyStore(Part):
    """Store of the policies in force, changed by `read`, `take_fleet` and operators' commands.

    Attributes:
        overrides: Overrides by this host's operators. Those of departed instances stay: an instance that comes back
            under the same id must not get its old tokens back.
        departed: Departure times of instances (Unix time), kept as long as a token of theirs may be unexpired.
    """

    keys: TokenKeys
    clock: Clock
    inventory: Inventory = field(default_factory=Inventory)
    overrides: Overrides = field(default_factory=Overrides)
    fleet: FleetPolicies = field(default_factory=FleetPolicies)
    departed: dict[str, int] = field(default_factory=dict)
    _unsaved: bool = False
    _book: PolicyBook = field(default_factory=PolicyBook)
    _in_force: PolicyBook = field(default_factory=PolicyBook)
    _made_of: tuple[object, ...] = ()

    def revoke(self, instance: InstanceId, here: Collection[str] | None = None) -> OperatorOverride:
        """Revoke the instance's tokens.

        Args:
            here: All instances that sources report; `None` if a source has not sent a full report.

        Raises:
            HostRefused: The file system refuses; nothing has changed.
        """
        return self._keep(instance, self._next_epoch(instance), here)

    def reopen(
        self, instance: InstanceId, now: int, here: Collection[str] | None = None
    ) -> OperatorOverride:
        """Restart the instance's boot grace.

        Args:
            here: All instances that sources report, as for `revoke`.

        Raises:
            HostRefused: The file system refuses; nothing has changed.
        """
        override = self.overrides.get(instance, OperatorOverride())
        return self._keep(instance, replace(override, reopened_at=now), here)

    def depart(self, instances: Collection[InstanceId]) -> None:
        """Note the departure of instances that no source reports; call `save` afterwards."""
        if instances:
            now = int(self.clock.now().timestamp())
            kept = {name: at for name, at in self.departed.items() if at > now - TTL_LIMIT_S}
            self.departed = kept | dict.fromkeys(instances, now)
            self._unsaved = True

    def arrive(self, instances: Collection[InstanceId]) -> None:
        """Revoke the tokens that these instances got under the same id before they departed; call `save` afterwards."""
        for instance in self.departed.keys() & instances:
            del self.departed[instance]
            self.overrides = self.overrides.replace(instance, self._next_epoch(instance))
            self._unsaved = True

    def save(self) -> None:
        """Write the changes of `depart` and `arrive`; may raise `HostRefused`."""
        if self._unsaved:
            self._store(self.overrides)

    def _next_epoch(self, instance: str) -> OperatorOverride:
        override = self.overrides.get(instance, OperatorOverride())
        return replace(override, epoch=override.epoch + 1)

    def _keep(
        self, instance: InstanceId, override: OperatorOverride, here: Collection[str] | None
    ) -> OperatorOverride:
        overrides = self.overrides.replace(instance, override)
        if here is not None:
            overrides = overrides.retire({*here, instance})
        self._store(overrides)
        self.overrides = overrides
        return override

    def _store(self, overrides: Overrides) -> None:
        listed = sorted(overrides.listed.items())
        content = {
            "format": _FORMAT,
            "instances": {name: [one.epoch, one.reopened_at] for name, one in listed},
            "retired": overrides.retired.render(),
            "departed": self.departed,
        }
        text = json.dumps(content, indent=1)
        # If a power cut undid a revocation, revoked tokens would be valid again.
        _write(self.keys.layout.overrides, text.encode())
        self._unsaved = False

    def take_fleet(self, fleet: FleetPolicies) -> FleetChange:
        """Replace the fleet's policies; return the changes on which the caller must act.

        Call this before publishing the records that belong to the policies. HAProxy gets new keys before its next
        records, and keeps the keys of a departing instance until its record is removed.
        """
        book, before = self.book(), self.fleet
        self.fleet, self.keys.of_instances = fleet, fleet.keys
        in_force = self.book()
        retired = {
            name for name in before.keys.keys() ^ fleet.keys.keys() if name in self.overrides
        }
        changed = {
            instance
            for instance in {*before.overrides, *fleet.overrides, *self.overrides, *retired}
            if book.override(instance) != in_force.override(instance)
        }
        return FleetChange(
            before.rules != fleet.rules,
            frozenset(map(InstanceId, changed)),
            keys=before.keys != fleet.keys,
        )

    def is_of_fleet(self, instance: InstanceId) -> bool:
        """Return whether the fleet's keys sign the instance's tokens, and fleet operators revoke them."""
        return bool(self.fleet.keys.get(instance))

    def read(self, settings: Settings) -> tuple[bool, bool]:
        """Apply settings, and read the keys from their key file.

        Returns:
            Whether records must be compiled again, and whether workers get other keys.

        Raises:
            SecretUnreadable: The keys cannot be used; everything stays as it was.
            HostRefused: The first key cannot be written.
        """
        keys = self.keys.read(settings.tokens.key_file)
        book = settings.policy.book()
        records, self._book = book != self._book, book
        return records, keys

    def open(self, settings: Settings) -> None:
        """Read settings, keys and overrides, and write the keys for HAProxy. Create the first key if there is none.

        Raises:
            SecretUnreadable: The keys cannot be used.
            HostRefused: A file cannot be written, or the overrides cannot be read.
        """
        self.read(settings)
        # Starting without unreadable overrides would make revoked tokens valid again.
        self.overrides, self.departed = read_overrides(self.keys.layout.overrides)
        self.keys.load()
        self.keys.preload()

    async def report(self) -> Mapping[str, object]:
        """Report settings sections for a network, project or instance that no source reports.

        A section with a mistyped name has no effect, so the instance it should protect stays open.
        """
        book, inventory = self._book, self.inventory
        projects: set[str | None] = set()
        if book.projects:
            for instance in inventory.instances.values():
                projects |= {instance.project, *(port.project for port in instance.ports)}
        known: dict[str, Callable[[str], object]] = {
            "networks": lambda one: inventory.knows(NetworkId(one)),
            "projects": projects.__contains__,
            "instances": lambda one: inventory.sources_of_instance(InstanceId(one)),
        }
        named = ((kind, one) for kind in known for one in getattr(book, kind))
        unmatched = (f"policy.{kind}.{one}" for kind, one in named if not known[kind](one))
        return {"unmatched_policies": tuple(unmatched)}

    def book(self) -> PolicyBook:
        """Return all policy rules except those in records."""
        made_of = self._book, self.overrides, self.fleet
        # Each part is replaced as a whole when it changes, so its identity tells.
        if [id(one) for one in made_of] != [id(one) for one in self._made_of]:
            overrides = join_fleet_overrides(self.overrides, self.fleet)
            self._in_force = replace(self._book, overrides=overrides, fleet=self.fleet.rules)
            self._made_of = made_of
        return self._in_force
