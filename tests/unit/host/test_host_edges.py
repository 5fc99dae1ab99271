"""The small ones: notifier, refusals, links for HAProxy, accounts, messages of netlink."""

import errno
import grp
import io
import os
import pwd
import socket
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imdsproxy.errors import DataplaneError, HostRefused, PrivilegeMissing, refusing
from imdsproxy.host.account import (
    Account,
    find_account,
    find_closed,
    group_name,
    owner_of,
    user_name,
)
from imdsproxy.host.netlink import parse_address
from imdsproxy.host.nlmessages import attribute, iter_messages, pack_attributes, parse_attributes
from imdsproxy.host.notify import ServiceNotifier, is_journal, kept_sockets
from imdsproxy.host.state import AddressState, ObservedAddress
from imdsproxy.model.entities import METADATA_IPV4, METADATA_IPV6
from imdsproxy.network.listeners.apply import apply_links


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


# Messages of netlink

_HEADER = struct.Struct("=IHHII")


@given(st.dictionaries(st.integers(0, 0x3FFF), st.binary(max_size=300), max_size=20))
def test_attributes_come_back_as_they_were_put_in(values: dict[int, bytes]) -> None:
    data = b"".join(attribute(kind, value) for kind, value in values.items())
    assert len(data) % 4 == 0
    assert parse_attributes(data) == values
    assert parse_attributes(attribute(0x8000 | 0x12, b"x")) == {0x12: b"x"}
    assert parse_attributes(b"head" + data, 4) == values


@given(st.binary(max_size=200))
def test_nonsense_is_neither_an_error_nor_endless(data: bytes) -> None:
    parse_attributes(data)
    list(iter_messages(data))


@given(st.binary(max_size=200), st.integers(0, 199))
def test_an_attribute_that_is_cut_short_ends_the_list(value: bytes, length: int) -> None:
    data = pack_attributes({1: 7}) + attribute(2, value)
    found = parse_attributes(data[: min(8 + length, len(data) - 1)])
    assert found.pop(1) == struct.pack("=I", 7)
    # A cut in the padding loses nothing of the value.
    assert set(found.values()) <= {value}


def test_messages_are_separated() -> None:
    first = _HEADER.pack(17, 16, 2, 5, 0) + b"a" + b"\0\0\0"
    second = _HEADER.pack(20, 3, 0, 5, 0) + b"done"
    assert list(iter_messages(first + second)) == [(16, 2, 5, b"a"), (3, 0, 5, b"done")]
    assert list(iter_messages(first + second[:-1])) == [(16, 2, 5, b"a")]


def _address(family: int, packed: bytes, flags: int = 0, *more: bytes) -> bytes:
    head = struct.pack("=BBBBI", family, 64, flags & 0xFF, 0, 3)
    return head + attribute(1, packed) + b"".join(more)


@pytest.mark.parametrize(
    ("flags", "state"),
    [
        (0x80, AddressState.USABLE),
        (0x40 | 0x80, AddressState.TENTATIVE),
        (0x08 | 0x40, AddressState.DUPLICATE),
        # Beyond the eight bits of the header: only the attribute has these.
        (0x240, AddressState.TENTATIVE),
    ],
)
def test_an_address_says_whether_it_can_be_bound(flags: int, state: AddressState) -> None:
    payload = _address(socket.AF_INET6, METADATA_IPV6.packed, flags, pack_attributes({8: flags}))
    assert parse_address(payload, {3: "eth0"}) == ObservedAddress(
        "eth0", METADATA_IPV6, 64, state, 0
    )


@pytest.mark.parametrize(
    ("packed", "more", "found"),
    [
        # Who added it.
        (METADATA_IPV4.packed, attribute(11, b"\xa9"), (0xA9, "3")),
        # Its own address counts, and its peer's does not.
        (bytes(4), attribute(2, METADATA_IPV4.packed), (0, "3")),
        (METADATA_IPV4.packed, attribute(2, bytes(4)), None),
        (b"\x0a\0\0\1", b"", None),
    ],
)
def test_an_address_is_read_with_its_origin_where_it_is_the_metadata_address(
    packed: bytes, more: bytes, found: tuple[int, str] | None
) -> None:
    seen = parse_address(_address(socket.AF_INET, packed, 0, more), {})
    assert (None if seen is None else (seen.protocol, seen.device)) == found
