"""Names of users and groups into ids."""

from __future__ import annotations

import grp
import pwd

from imdsproxy.errors import HostRefused

__all__ = ["group_id", "owner_of", "user_id"]


def user_id(name: str) -> int:
    """The uid of an account; `HostRefused` when there is none."""
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError as error:
        raise HostRefused(
            f"there is no user {name}", hint="create it, or change the setting"
        ) from error


def group_id(name: str) -> int:
    """The gid of a group; `HostRefused` when there is none."""
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError as error:
        raise HostRefused(
            f"there is no group {name}", hint="create it, or change the setting"
        ) from error


def owner_of(user: str | None, group: str | None) -> tuple[int, int]:
    """Ids for `chown`, -1 for what is to stay."""
    return (-1 if user is None else user_id(user), -1 if group is None else group_id(group))
