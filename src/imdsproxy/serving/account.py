"""The unprivileged account that worker processes take."""

from __future__ import annotations

import grp
import os
import pwd
from dataclasses import dataclass

from imdsproxy.errors import HostRefused

__all__ = ["Account", "find_account"]


@dataclass(frozen=True, slots=True)
class Account:
    """A user and a group, by number."""

    user: int
    group: int

    def assume(self) -> None:
        """Become this account, for good; supplementary groups go too.

        Raises:
            OSError: The kernel refuses.
        """
        os.setgroups([])
        os.setresgid(self.group, self.group, self.group)
        os.setresuid(self.user, self.user, self.user)


def find_account(user: str | None, group: str | None) -> Account | None:
    """The account of that name; `None` when this process is not root and so cannot change to it.

    Without a group it is the user's own; with neither nothing is to be changed.

    Raises:
        HostRefused: There is no such user or group.
    """
    if os.geteuid() != 0 or (user is None and group is None):
        return None
    try:
        entry = None if user is None else pwd.getpwnam(user)
    except KeyError as error:
        raise HostRefused(
            f"there is no user {user!r} on this host",
            hint="create it, or name another in documents.user (null keeps the present account)",
        ) from error
    try:
        number = None if group is None else grp.getgrnam(group).gr_gid
    except KeyError as error:
        raise HostRefused(
            f"there is no group {group!r} on this host",
            hint="create it, or name another in documents.group (null is the user's own)",
        ) from error
    if number is None:
        number = os.getegid() if entry is None else entry.pw_gid
    return Account(os.geteuid() if entry is None else entry.pw_uid, number)
