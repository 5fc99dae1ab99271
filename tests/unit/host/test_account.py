from __future__ import annotations

import grp
import os
import pwd
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from imdsproxy.errors import HostRefused
from imdsproxy.host.account import Account, find_account, find_closed


def test_nothing_named_changes_nothing() -> None:
    assert find_account(None, None) is None


def test_without_root_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert find_account("nobody", "nogroup") is None


@pytest.fixture
def as_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)


@pytest.mark.usefixtures("as_root")
def test_a_user_brings_its_group() -> None:
    nobody = pwd.getpwnam("nobody")
    assert find_account("nobody", None) == Account(nobody.pw_uid, nobody.pw_gid)


@pytest.mark.usefixtures("as_root")
def test_a_group_may_be_named_with_or_without_a_user() -> None:
    nobody, root = pwd.getpwnam("nobody"), grp.getgrnam("root")
    assert find_account("nobody", "root") == Account(nobody.pw_uid, root.gr_gid)
    assert find_account(None, "root") == Account(0, root.gr_gid)


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize(("user", "group"), [("imdsproxy-none", None), (None, "imdsproxy-none")])
def test_a_name_that_there_is_not_is_told(user: str | None, group: str | None) -> None:
    with pytest.raises(HostRefused, match="imdsproxy-none") as refused:
        find_account(user, group)
    assert "create it" in refused.value.hint


@pytest.mark.root
def test_the_first_directory_that_an_account_cannot_enter_is_found() -> None:
    nobody = pwd.getpwnam("nobody")
    account = Account(nobody.pw_uid, nobody.pw_gid)
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
        os.chown(closed, nobody.pw_uid, -1)
        assert find_closed(account, inner) is None


@pytest.mark.root
def test_without_the_right_to_take_an_account_nothing_is_found() -> None:
    script = (
        "from pathlib import Path\n"
        "from imdsproxy.host.account import Account, find_closed\n"
        "print(find_closed(Account(65534, 65534), Path('/root')))"
    )
    done = subprocess.run(
        ("/usr/bin/setpriv", "--bounding-set=-setuid,-setgid", sys.executable, "-c", script),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "None\n"
