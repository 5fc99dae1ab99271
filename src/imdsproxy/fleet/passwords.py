"""A guest's password on a fleet host: plan for the host's file, given the fleet's value. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeAlias

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
    """Return the next step for the host's file, or `None`.

    Args:
        local: Password in the file; `None` without a file.
        fleet: Value of the fleet: a password, `CLEARED`, or `None`.
        before: Value of the fleet when this host last checked, or the password that this host has sent since.
    """
    if fleet:
        return None if local == fleet else Keep(fleet)
    if local is None:
        return None
    # A local password that differs from the cleared one is new: the guest may post again after the clearing.
    return Forget() if fleet == CLEARED and local == before else Send(local)
