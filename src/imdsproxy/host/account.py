"""Accounts: names and numbers, and the unprivileged account of worker processes."""

import grp
import os
import pwd
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from imdsproxy.errors import HostRefused

T = TypeVar("T")
_TRY: Final = 'for place; do cd "$place" || { printf %s "$place"; exit 1; }; done'
_TRY_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Account:
    user: int
    group: int

    def assume(self, groups: Sequence[int] = ()) -> None:
        """Become this account for good, with exactly these supplementary groups; raise `OSError` if refused."""
        os.setgroups(groups)
        os.setresgid(self.group, self.group, self.group)
        os.setresuid(self.user, self.user, self.user)


def find_closed(account: Account | None, path: Path) -> Path | None:
    """Return the first directory on the path to `path`, inclusive, that the account cannot enter; `None` for none.

    A process with that account tries, because modes do not tell all (access control lists, mounts, security modules).
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
        # The path has a mount whose server is gone.
        return path
    except (OSError, subprocess.SubprocessError):
        # This process may not change to other accounts.
        return None
    return Path(os.fsdecode(tried.stdout)) if tried.stdout else None


def find_account(
    user: str | None, group: str | None, setting: str = "documents.user"
) -> Account | None:
    """Return the account with these names; `None` if this process is not root and so cannot change to it.

    Without a group, use the user's own group; without both, keep the present account. Raises `HostRefused` if the user
    or group does not exist; the error's hint names the setting.
    """
    if os.geteuid() != 0 or (user is None and group is None):
        return None
    uid, gid = os.geteuid(), os.getegid()
    # Look up names only, even if a name is a number: "0" is not root.
    if user is not None:
        instead = f"name another in {setting} (null keeps the present account)"
        entry = _look_up("user", user, instead, pwd.getpwnam)
        uid, gid = entry.pw_uid, entry.pw_gid
    if group is not None:
        of_group = f"{setting.partition('.')[0]}.group"
        instead = f"name another in {of_group} (null is the user's own)"
        gid = _look_up("group", group, instead, grp.getgrnam).gr_gid
    return Account(uid, gid)


def account_of(name: str, setting: str) -> Account:
    instead = f"name another in {setting} (null keeps the present account)"
    entry = _look_up("user", name, instead, pwd.getpwnam)
    return Account(entry.pw_uid, entry.pw_gid)


def _look_up(kind: str, word: str, instead: str, look: Callable[[str], T]) -> T:
    try:
        return look(word)
    except (KeyError, OverflowError) as error:
        hint = f"create it, or {instead}"
        raise HostRefused(f"there is no {kind} {word}", hint=hint) from error


def user_id(name: str) -> int:
    """Return the uid of an account; raise `HostRefused` if there is none."""
    return _look_up("user", name, "change the setting", pwd.getpwnam).pw_uid


def group_id(name: str) -> int:
    """Return the gid of a group; raise `HostRefused` if there is none."""
    return _look_up("group", name, "change the setting", grp.getgrnam).gr_gid


def owner_of(user: str | None, group: str | None) -> tuple[int, int]:
    """Return ids for `chown`; -1 keeps the present id."""
    return (-1 if user is None else user_id(user), -1 if group is None else group_id(group))


def user_name(word: str) -> str:
    """Return the name of an account, given by name or uid; raise `HostRefused` if there is none."""

    def look(word: str) -> pwd.struct_passwd:
        return pwd.getpwuid(int(word)) if word.isdecimal() else pwd.getpwnam(word)

    return _look_up("user", word, "name another one", look).pw_name


def group_name(word: str) -> str:
    """Return the name of a group, given by name or gid; raise `HostRefused` if there is none."""

    def look(word: str) -> grp.struct_group:
        return grp.getgrgid(int(word)) if word.isdecimal() else grp.getgrnam(word)

    return _look_up("group", word, "name another one", look).gr_name
