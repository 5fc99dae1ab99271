from __future__ import annotations

import grp
import os
import pwd
import tempfile
from pathlib import Path

import pytest

from imdsproxy.errors import HostRefused
from imdsproxy.host.account import (
    Account,
    find_account,
    find_closed,
    group_name,
    owner_of,
    user_name,
)

_USER, _GROUP = pwd.getpwnam("nobody"), grp.getgrnam("root").gr_gid


@pytest.mark.parametrize(
    ("root", "user", "group", "found"),
    [
        (True, None, None, None),
        (False, "nobody", "nogroup", None),
        (True, "nobody", None, Account(_USER.pw_uid, _USER.pw_gid)),
        (True, "nobody", "root", Account(_USER.pw_uid, _GROUP)),
        (True, None, "root", Account(0, _GROUP)),
    ],
)
def test_root_takes_the_account_that_is_named(
    monkeypatch: pytest.MonkeyPatch,
    user: str | None,
    group: str | None,
    found: Account | None,
    *,
    root: bool,
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0 if root else 1000)
    assert find_account(user, group) == found


@pytest.mark.parametrize(
    ("user", "group"), [("imdst-none", None), (None, "imdst-none"), ("0", None), (None, "0")]
)
def test_a_name_that_does_not_exist_is_an_error(
    monkeypatch: pytest.MonkeyPatch, user: str | None, group: str | None
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(HostRefused, match=f"no (user|group) {user or group}") as refused:
        find_account(user, group)
    assert "create it" in refused.value.hint
    with pytest.raises(HostRefused):
        owner_of(user, group)


def test_an_account_of_a_proxy_is_named_or_numbered() -> None:
    assert (user_name("0"), user_name("nobody"), group_name("0")) == ("root", "nobody", "root")


@pytest.mark.root
def test_the_first_directory_that_an_account_cannot_enter_is_found() -> None:
    account = Account(_USER.pw_uid, _USER.pw_gid)
    # Not below pytest's own directory, which is closed to others.
    with tempfile.TemporaryDirectory(prefix="imdst-") as name:
        top = Path(name)
        top.chmod(0o755)
        closed = top / "closed with a blank"
        inner = closed / "inner"
        inner.mkdir(parents=True)
        assert find_closed(account, inner / "not there yet") is None
        closed.chmod(0o700)
        assert find_closed(account, inner) == closed
        assert find_closed(None, inner) is None
        os.chown(closed, account.user, -1)
        assert find_closed(account, inner) is None
