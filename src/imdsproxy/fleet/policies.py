"""The fleet's rules, operator overrides and session token keys, as a host applies them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from imdsproxy.model.observation import SourceName
from imdsproxy.model.policy import UNTOUCHED, FleetRules, OperatorOverride
from imdsproxy.model.retired import Overrides
from imdsproxy.model.tokens import InstanceKeys

FLEET: Final[SourceName] = "fleet"
"""Source of the records that a fleet places on this host."""


@dataclass(frozen=True, slots=True)
class FleetPolicies:
    """Fleet's policies for guests of this host.

    Attributes:
        overrides: Overrides of the fleet's operators by instance.
        keys: Token keys of each fleet instance on this host (`model.tokens.instance_key`), the key in force first.
    """

    rules: FleetRules = field(default_factory=FleetRules)
    overrides: Mapping[str, OperatorOverride] = field(default_factory=dict)
    keys: InstanceKeys = field(default_factory=dict, repr=False)


def join_fleet_overrides(own: Overrides, fleet: FleetPolicies) -> Overrides:
    """Merge the overrides of this host's operators and of the fleet's.

    The later reopening starts the boot. If an instance has keys of the fleet, only the fleet's epoch counts. A maximum
    would hide the fleet's next revocation if this host's epoch were higher, and a revocation on this host concerns
    tokens signed by this host's keys, which are not valid for the instance. Without such keys, both epochs are added.
    """
    joined = dict(own.listed)
    for instance in {*fleet.overrides, *(name for name in fleet.keys if name in own)}:
        theirs, ours = fleet.overrides.get(instance, UNTOUCHED), own.get(instance, UNTOUCHED)
        epoch = theirs.epoch if instance in fleet.keys else theirs.epoch + ours.epoch
        joined[instance] = OperatorOverride(epoch, max(theirs.reopened_at, ours.reopened_at))
    return Overrides(joined, own.retired)
