"""All networks and instances at one moment, and who claims which address.

Sources report `Observation`s; `Inventory.observe` folds one in and says whose data-plane records may
have changed. What is in force is a function of the sources' present records, never of the order in which
they came: an address or an id that two sources give to different things is a conflict, not a race.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from imdsproxy.core.model import Instance, InstanceId, IpAddress, Network, NetworkId
from imdsproxy.errors import Problem

__all__ = ["AddressKey", "Observation", "SourceName"]

SourceName: TypeAlias = str
AddressKey: TypeAlias = tuple[NetworkId, IpAddress]


@dataclass(frozen=True, slots=True)
class Observation:
    """What a source saw.

    Attributes:
        source: Who saw it.
        full: The mappings are everything that the source has: what is not in them is gone. Otherwise they
            hold changes only, and `*_removed` what went.
        in_sync: The source has told all that it knows; before that nothing may be swept, and an unknown
            address is answered 503, not 404.
        problems: Every record refused at this moment (the whole list, not the change).
    """

    source: SourceName
    full: bool = False
    networks: Mapping[NetworkId, Network] = field(default_factory=dict)
    instances: Mapping[InstanceId, Instance] = field(default_factory=dict)
    networks_removed: Iterable[NetworkId] = ()
    instances_removed: Iterable[InstanceId] = ()
    in_sync: bool = True
    problems: tuple[Problem, ...] = ()
