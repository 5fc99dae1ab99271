"""What a source of records is, seen from who consumes it.

A source is made by the composition root, runs as one task, and reports by calling `publish` in the
event loop's thread. Its first observation is full: everything that it has, in sync, once it has read all of
it; pieces of it that come before are out of sync, and say that more follows. Later ones may hold only changes.
Where it cannot read its records, it reports itself out of sync with the reason among the problems, keeps trying,
and what it published before stays; it never ends by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    from imdsproxy.core.model import Instance, InstanceId, IpAddress, Network, NetworkId, Scope
    from imdsproxy.core.observation import AddressKey, Observation, SourceName

__all__ = [
    "Confirmation",
    "LookUp",
    "LookUpSource",
    "LookUpUnavailable",
    "Origin",
    "PortAmbiguous",
    "PortFound",
    "PortMissing",
    "Publish",
    "Source",
    "WritableSource",
    "Written",
]

Publish: TypeAlias = "Callable[[Observation], None]"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a part of a record was written: the field, and the file and line where there are any."""

    field: str
    file: str | None = None
    line: int | None = None


class Source(Protocol):
    """Where networks, ports and instances come from."""

    @property
    def name(self) -> SourceName:
        """Its name in settings, status and conflicts."""

    async def run(self, publish: Publish) -> None:
        """Report until cancelled; everything opened is closed again when that is over."""

    def origin_of_port(self, instance: InstanceId, number: int) -> Origin | None:
        """Where an instance's port (from 0) was written; `None` when the source has no such port."""


class Written(StrEnum):
    """What a write did."""

    ADDED = "added"
    CHANGED = "changed"
    UNCHANGED = "unchanged"


@dataclass(frozen=True, slots=True)
class Tally:
    """What a write of many records did: how many were added, changed, and there already."""

    added: int = 0
    changed: int = 0
    unchanged: int = 0


class WritableSource(Source, Protocol):
    """A source that the admin API can write to.

    A write is on disk, and its observation published, when it returns. It is refused as a whole
    (`SourceRefused` with the fields) or done as a whole. While the source is not running or its store
    cannot be used, writes raise `SourceUnavailable` or `SourceCorrupt`.
    """

    async def put_network(self, network: Network) -> Written:
        """Add a network, or change the one with its id."""

    async def put_instance(self, instance: Instance) -> Written:
        """Add an instance, or change the one with its id.

        One that does not say when it was made keeps the time that the source has, and has come now where the
        source does not have it.

        Raises:
            SourceRefused: Another instance of the store has one of its addresses or MACs.
        """

    async def put_records(
        self, networks: Iterable[Network], instances: Collection[Instance]
    ) -> Tally:
        """Add or change many at once; all or none.

        Raises:
            SourceRefused: As above; a problem's field begins with `networks[i]` or `instances[i]`.
        """

    async def remove_network(self, network: NetworkId, *, force: bool = False) -> bool:
        """Remove a network; `False` when there is none of that id.

        Raises:
            SourceRefused: Instances of the store have ports in it, unless `force`: then these claim
                nothing until the network comes again.
        """

    async def remove_instance(self, instance: InstanceId) -> bool:
        """Remove an instance; `False` when there is none of that id."""


@dataclass(frozen=True, slots=True)
class PortFound:
    """One port has the address; its instance was published before this is told.

    Attributes:
        network: The port's own: behind a router it is not the id that was asked for.
    """

    network: NetworkId
    instance: InstanceId


@dataclass(frozen=True, slots=True)
class PortMissing:
    """Nobody who may be told anything has the address."""


@dataclass(frozen=True, slots=True)
class PortAmbiguous:
    """So many ports have it; whose guest asks is not guessed."""

    count: int


@dataclass(frozen=True, slots=True)
class LookUpUnavailable:
    """It cannot be found out now, and nothing is known of the address."""

    reason: str


LookUp: TypeAlias = PortFound | PortMissing | PortAmbiguous | LookUpUnavailable


@dataclass(frozen=True, slots=True)
class Confirmation:
    """How fresh it is what is known of an address.

    Attributes:
        port: The port's id.
        age_s: Seconds since it was asked for and confirmed.
        stale: It should have been confirmed since, and cannot be now.
    """

    port: str
    age_s: float
    stale: bool


class LookUpSource(Source, Protocol):
    """A source that does not tell everything by itself, but can be asked for an address.

    It is in sync also while it cannot be asked: who is not known is then told so by `LookUpUnavailable`.
    """

    async def look_up(self, scope: Scope, network: NetworkId, address: IpAddress) -> LookUp:
        """Whose the address is, for a guest that asks; never raises.

        Args:
            scope: What `network` stands for.
            network: A network's id, or a router's.
            address: The guest's.
        """

    def routes(self) -> Mapping[AddressKey, PortFound]:
        """Every address behind a router (the router's id in the key) that was looked up and holds now."""

    def confirmation(self, network: NetworkId, address: IpAddress) -> Confirmation | None:
        """How fresh it is what is known of an address in its own network; `None` if nothing is."""
