"""What a host does with what its fleet says of guests: rules, guards, and keys of session tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from imdsproxy.core.observation import SourceName
from imdsproxy.core.policy import UNTOUCHED, FleetRules, OperatorOverride
from imdsproxy.core.retired import Overrides
from imdsproxy.core.tokens import InstanceKeys

FLEET: Final[SourceName] = "fleet"
"""The source of records that a fleet places on this host."""


@dataclass(frozen=True, slots=True)
class FleetPolicies:
    """All that a fleet says of guests of this host.

    Attributes:
        guards: What the fleet's operators did about single instances.
        keys: Of each instance of the fleet that is here (`core.tokens.instance_key`), the one in force first.
    """

    rules: FleetRules = field(default_factory=FleetRules)
    guards: Mapping[str, OperatorOverride] = field(default_factory=dict)
    keys: InstanceKeys = field(default_factory=dict, repr=False)


def join_guards(own: Overrides, fleet: FleetPolicies) -> Overrides:
    """What is in force of what this host's operators and the fleet's did about instances.

    A boot begins when it was opened last. The epoch of an instance with keys of the fleet is the fleet's alone: a
    maximum would hide the fleet's next revocation where this host counted further, and what was revoked here were
    tokens by this host's keys, which are not believed for it. Without such keys each revocation counts.
    """
    joined = dict(own.listed)
    for instance in {*fleet.guards, *(name for name in fleet.keys if name in own)}:
        theirs, ours = fleet.guards.get(instance, UNTOUCHED), own.get(instance, UNTOUCHED)
        epoch = theirs.epoch if instance in fleet.keys else theirs.epoch + ours.epoch
        joined[instance] = OperatorOverride(epoch, max(theirs.reopened_at, ours.reopened_at))
    return Overrides(joined, own.retired)
