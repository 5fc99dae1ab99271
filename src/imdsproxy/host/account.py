"""Names of users and groups into ids."""

from __future__ import annotations

import grp
import pwd

from imdsproxy.errors import HostRefused


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


def user_name(word: str) -> str:
    """The name of an account, given by name or by uid; `HostRefused` when there is none."""
    try:
        return pwd.getpwuid(int(word)).pw_name if word.isdecimal() else pwd.getpwnam(word).pw_name
    except (KeyError, OverflowError) as error:
        raise HostRefused(
            f"there is no user {word}", hint="create it, or name another one"
        ) from error


def group_name(word: str) -> str:
    """The name of a group, given by name or by gid; `HostRefused` when there is none."""
    try:
        return grp.getgrgid(int(word)).gr_name if word.isdecimal() else grp.getgrnam(word).gr_name
    except (KeyError, OverflowError) as error:
        raise HostRefused(
            f"there is no group {word}", hint="create it, or name another one"
        ) from error
