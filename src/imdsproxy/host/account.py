"""The unprivileged account that worker processes take."""

from __future__ import annotations

import grp
import os
import pwd
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from imdsproxy.errors import HostRefused

_TRY: Final = 'for place; do cd "$place" || { printf %s "$place"; exit 1; }; done'
_TRY_S: Final = 5.0


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


def find_closed(account: Account | None, path: Path) -> Path | None:
    """The first directory on the way to `path`, that included, which the account cannot enter; `None` for none.

    A process of that account tries: modes do not say all (access control lists, mounts, security modules).
    What is not there yet is not tried.
    """
    there = [one for one in (*reversed(path.absolute().parents), path) if one.is_dir()]
    try:
        tried = subprocess.run(
            ("/bin/sh", "-c", _TRY, "sh", *there),
            user=account.user if account else None,
            group=account.group if account else None,
            extra_groups=[] if account else None,
            capture_output=True,
            cwd="/",
            env={},
            check=False,
            timeout=_TRY_S,
        )
    except subprocess.TimeoutExpired:
        # A mount whose server is gone.
        return path
    except (OSError, subprocess.SubprocessError):
        # This process may not take other accounts.
        return None
    return Path(os.fsdecode(tried.stdout)) if tried.stdout else None


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
