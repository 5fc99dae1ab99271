"""The small ones: notifier, refusals, links for HAProxy, accounts."""

from __future__ import annotations

import errno
import grp
import io
import os
import pwd
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from imdsproxy.errors import DataplaneError, HostRefused, PrivilegeMissing, refusing
from imdsproxy.host.account import (
    Account,
    find_account,
    find_closed,
    group_name,
    owner_of,
    user_name,
)
from imdsproxy.host.notify import ServiceNotifier, is_journal, kept_sockets
from imdsproxy.listeners.apply import apply_links


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    abstract = f"@imdst-notify-{os.getpid()}"
    address = abstract if request.param == "abstract" else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.settimeout(5)
        listening.bind(address.replace("@", "\0"))
        yield listening, address


def test_the_manager_receives_every_state(manager: tuple[socket.socket, str]) -> None:
    listening, address = manager
    notifier = ServiceNotifier(address)
    notifier.ready("3 networks\nand more")
    notifier.reloading(12)
    notifier.send(WATCHDOG="1")
    assert [listening.recv(1000) for _ in range(3)] == [
        b"READY=1\nSTATUS=3 networks and more",
        b"RELOADING=1\nMONOTONIC_USEC=12",
        b"WATCHDOG=1",
    ]


def test_without_a_manager_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []
    monkeypatch.setattr("imdsproxy.host.notify.socket.socket", lambda *words: opened.append(words))
    ServiceNotifier().ready()
    assert not ServiceNotifier().keep("audit", 0)
    assert opened == []


def test_the_journal_is_known_by_the_device_and_inode_that_the_manager_names(
    tmp_path: Path,
) -> None:
    with (tmp_path / "journal").open("w") as stream:
        status = os.fstat(stream.fileno())
        named = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
        assert is_journal(stream, named)
        assert not is_journal(stream, {"JOURNAL_STREAM": f"{status.st_dev}:1"})
        assert not is_journal(stream, {})
        assert not is_journal(io.StringIO(), named)


def test_the_manager_keeps_a_socket_for_the_next_process(
    manager: tuple[socket.socket, str],
) -> None:
    listening, address = manager
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert ServiceNotifier(address).keep("audit", ours.fileno())
        text, (kept,), _, _ = socket.recv_fds(listening, 1000, 1)
        assert text == b"FDSTORE=1\nFDNAME=audit"
        theirs.send(b"x")
        assert os.read(kept, 1) == b"x"
        os.close(kept)


@pytest.mark.parametrize(
    "environment",
    [{}, {"LISTEN_PID": "17", "LISTEN_FDNAMES": "other"}, {"LISTEN_FDNAMES": "audit"}],
)
def test_sockets_of_another_process_or_name_are_left_alone(environment: dict[str, str]) -> None:
    assert kept_sockets({"LISTEN_PID": "18", "LISTEN_FDS": "1", **environment}, "audit", 17) == []


@pytest.mark.parametrize(
    ("number", "kind", "message", "hint"),
    [
        (errno.ENOSPC, HostRefused, "No space left on device (ENOSPC)", "free some"),
        (errno.EPERM, PrivilegeMissing, "Operation not permitted (EPERM)", "CAP_NET"),
        (errno.EACCES, PrivilegeMissing, "Permission denied (EACCES)", "CAP_NET_"),
        (None, HostRefused, "odd (unknown error)", ""),
    ],
)
def test_a_refusal_says_what_was_refused_why_and_what_helps(
    number: int | None, kind: type[DataplaneError], message: str, hint: str
) -> None:
    error = OSError("odd") if number is None else OSError(number, os.strerror(number))
    with pytest.raises(kind) as refused, refusing("create namespace blue"):
        raise error
    assert refused.value.message == f"cannot create namespace blue: {message}"
    assert hint in refused.value.hint
    assert refused.value.__cause__ is error
    with pytest.raises(kind) as refused, refusing("do it", hint="look"):
        raise error
    assert refused.value.hint == "look"


def _links(place: Path) -> dict[str, str]:
    return {path.name: str(path.readlink()) for path in place.iterdir() if path.is_symlink()}


def test_links_are_made_changed_and_removed_and_left_alone_when_right(tmp_path: Path) -> None:
    place = tmp_path / "links"
    for links in (
        {"blue.1": "/run/netns/blue", "red.2": "/run/netns/red"},
        {"blue.1": "/run/netns/blue", "red.2": "/elsewhere/red"},
    ):
        made = {path: path.lstat().st_ino for path in place.glob("*.1")}
        apply_links(place, links)
        assert _links(place) == links
        assert made.items() <= {path: path.lstat().st_ino for path in place.iterdir()}.items()
        # What a killed process left half made does not stay.
        (place / ".tmp").symlink_to("/run/netns/old")
    (place / "readme").touch()
    apply_links(place, {})
    assert [path.name for path in place.iterdir()] == ["readme"]
    # A link takes the place of a file that has its name.
    apply_links(place, {"readme": "/run/netns/blue"})
    assert _links(place) == {"readme": "/run/netns/blue"}
    (tmp_path / "file").touch()
    with pytest.raises(HostRefused, match="link namespaces"):
        apply_links(tmp_path / "file", {})


# Accounts

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
