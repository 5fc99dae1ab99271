"""A guest's password on a host of a fleet: what the host does about its own file, given what the fleet has. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeAlias

CLEARED: Final = b""
"""An operator has cleared the password. No guest posts an empty one."""


@dataclass(frozen=True, slots=True)
class Keep:
    """Have the fleet's password in the file."""

    password: bytes


@dataclass(frozen=True, slots=True)
class Forget:
    """Remove the file."""


@dataclass(frozen=True, slots=True)
class Send:
    """Send the file's password to a hub: the guest has posted it here."""

    password: bytes


PasswordStep: TypeAlias = Keep | Forget | Send | None


def plan_password(local: bytes | None, fleet: bytes | None, before: bytes | None) -> PasswordStep:
    """What is to be done.

    Args:
        local: What the file has; `None` where there is none.
        fleet: What the fleet has: a password, `CLEARED`, or `None` for nothing.
        before: What the fleet had when this host last looked, or what this host has sent since.
    """
    if fleet:
        return None if local == fleet else Keep(fleet)
    if local is None:
        return None
    # Another one was posted since: the guest may, once the password before is cleared.
    return Forget() if fleet == CLEARED and local == before else Send(local)
