"""What a source of records is, seen from who consumes it.

A source is made by the controller, runs once, as one task, and reports by calling `publish` in the
event loop's thread. Its first observation is full: everything that it has, in sync, once it has read all of
it; pieces of it that come before are out of sync, and say that more follows. Later ones may hold only changes.
Where it cannot read its records, it reports itself out of sync with the reason among the problems, keeps trying,
and what it published before stays; it never ends by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, TypeAlias

from imdsproxy.core.model import InstanceId, IpAddress, NetworkId, Scope
from imdsproxy.core.observation import AddressKey, Observation, SourceName

Publish: TypeAlias = Callable[[Observation], object]


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


@dataclass(frozen=True, slots=True)
class PortFound:
    """One port has the address; its instance was published before.

    Attributes:
        network: The port's own: behind a router it is not the id that was asked for.
    """

    network: NetworkId
    instance: InstanceId


@dataclass(frozen=True, slots=True)
class PortMissing:
    """No port that serves has the address."""


@dataclass(frozen=True, slots=True)
class PortAmbiguous:
    """So many ports have it, and none is chosen."""

    count: int


@dataclass(frozen=True, slots=True)
class LookUpUnavailable:
    """It cannot be looked up now, and nothing is known of the address."""

    reason: str


LookUp: TypeAlias = PortFound | PortMissing | PortAmbiguous | LookUpUnavailable


@dataclass(frozen=True, slots=True)
class Confirmation:
    """How fresh the information about an address is.

    Attributes:
        port: The port's id.
        age_s: Seconds since it was asked for and confirmed.
        stale: It should have been confirmed since, and cannot be now.
    """

    port: str
    age_s: float
    stale: bool


class LookUpSource(Source, Protocol):
    """A source that does not report everything by itself, but can look an address up.

    It is in sync also while it cannot: then look-ups of unknown addresses give `LookUpUnavailable`.
    """

    async def look_up(self, scope: Scope, network: NetworkId, address: IpAddress) -> LookUp:
        """The instance that has the address, for a guest that asks; never raises.

        Args:
            scope: What `network` stands for.
            network: A network's id, or a router's.
            address: The guest's.
        """

    def routes(self) -> Mapping[AddressKey, PortFound]:
        """Every address behind a router (the router's id in the key) that was looked up and holds now."""

    def confirmation(self, network: NetworkId, address: IpAddress) -> Confirmation | None:
        """How fresh the information about an address in its own network is; `None` if there is none."""
