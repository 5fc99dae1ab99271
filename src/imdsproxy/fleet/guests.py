"""The fleet's rules, overrides, token keys and passwords for guests of a host, as the host applies them. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from imdsproxy.model.observation import SourceName
from imdsproxy.model.policy import UNTOUCHED, FleetRules, OperatorOverride
from imdsproxy.model.retired import Overrides
from imdsproxy.model.tokens import InstanceKeys

FLEET: Final[SourceName] = "fleet"
"""Source of the records that a fleet places on this host."""


@dataclass(frozen=True, slots=True)
class FleetPolicies:
    """Fleet's policies for guests of this host; the overrides are its operators', by instance.

    `keys` has the token keys of each fleet instance on this host (`model.tokens.instance_key`), the key in force first.
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


CLEARED: Final = b""
"""Value of a password that an operator has cleared. No guest posts an empty password."""


@dataclass(frozen=True, slots=True)
class Keep:
    """Write the fleet's password to the file."""

    password: bytes


@dataclass(frozen=True, slots=True)
class Forget:
    """Remove the file."""


@dataclass(frozen=True, slots=True)
class Send:
    """Send the file's password to a hub: the guest has posted it on this host."""

    password: bytes


PasswordStep: TypeAlias = Keep | Forget | Send | None


def plan_password(local: bytes | None, fleet: bytes | None, before: bytes | None) -> PasswordStep:
    """Return the next step for the host's file, which has the password `local`.

    `before` is the fleet's value when this host last checked, or the password that this host has sent since.
    """
    if fleet:
        return None if local == fleet else Keep(fleet)
    if local is None:
        return None
    # A local password that differs from the cleared one is new: the guest may post again after the clearing.
    return Forget() if fleet == CLEARED and local == before else Send(local)


@dataclass(frozen=True, slots=True)
class FleetReport:
    """State of the fleet on this host.

    Attributes:
        hub: URL of the hub that this host follows; empty for none.
        age_s: Seconds since a followed hub last knew the state of the fleet.
        revision: All items up to this revision are in force, except items in `failing`.
        held: Items that are still served although the fleet's store lacks them or has an older version.
        failing: Items whose newest version is not in force, with reasons.
        skew_s: Seconds by which the hub's clock is ahead of this host's.
        certificate_end: Unix time when this host's certificate ends; `None` if another program renews the certificate.
        serves_for_s: Seconds for which instances are still served without a hub; 0 if guests get 503, `None` for no
            limit.
    """

    hub: str
    age_s: float
    revision: int
    items: int
    held: tuple[str, ...] = ()
    failing: Mapping[str, str] = field(default_factory=dict)
    skew_s: float = 0.0
    certificate_end: float | None = None
    serves_for_s: float | None = None
