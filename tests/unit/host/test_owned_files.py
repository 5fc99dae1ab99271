"""Which files of another account are opened, and that a name that is exchanged meanwhile changes nothing."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from imdsproxy.errors import ConfigUnreadable, FileUntrusted
from imdsproxy.host.files import write_atomic
from imdsproxy.host.owned_files import list_owned, open_owned

pytestmark = pytest.mark.root

_NEUTRON = (4242, 4343)
_STRANGER = 65534


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made = tmp_path / "etc" / "l3_agent.ini"
    made.parent.mkdir()
    made.write_text("genuine")
    return made


def _read(path: Path, root: Path = Path("/")) -> bytes:
    with open_owned(path, _NEUTRON, root) as file:
        return file.read()


def _give_to_group(file: Path) -> None:
    os.chown(file, 0, _STRANGER)
    file.chmod(0o660)


def test_a_file_of_roots_or_of_the_account_is_read(file: Path) -> None:
    assert _read(file) == b"genuine"
    os.chown(file, *_NEUTRON)
    file.chmod(0o660)
    os.chown(file.parent, *_NEUTRON)
    assert _read(file) == b"genuine"
    assert list_owned(file.parent, _NEUTRON) == [file.name]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda file: os.chown(file, _STRANGER, 0), f"belongs to user {_STRANGER}"),
        (lambda file: os.chown(file.parent, _STRANGER, 0), f"belongs to user {_STRANGER}"),
        (lambda file: file.chmod(0o646), "every user may write"),
        (lambda file: file.parent.chmod(0o777), "every user may write"),
        (_give_to_group, "group 65534 may write"),
    ],
)
def test_a_file_that_another_user_may_change_is_refused(
    file: Path, spoil: Callable[[Path], object], reason: str
) -> None:
    spoil(file)
    with pytest.raises(FileUntrusted, match=reason):
        _read(file)


def test_a_link_of_another_user_is_not_followed_and_one_of_roots_is(
    file: Path, tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    link = shared / "link.ini"
    link.symlink_to(file)
    assert _read(link) == b"genuine"
    os.chown(link, _STRANGER, 0, follow_symlinks=False)
    with pytest.raises(FileUntrusted, match=r"link\.ini belongs"):
        _read(link)


def test_links_stay_within_the_root_of_a_container(file: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("the host's")
    (file.parent / "absolute").symlink_to("/etc/l3_agent.ini")
    (file.parent / "above").symlink_to("../../../etc/l3_agent.ini")
    (file.parent / "host").symlink_to(outside)
    for name in ("l3_agent.ini", "absolute", "above"):
        assert _read(Path("/etc", name), tmp_path) == b"genuine"
    with pytest.raises(ConfigUnreadable, match="No such file"):
        _read(Path("/etc/host"), tmp_path)


def test_what_is_no_regular_file_or_leads_nowhere_is_unreadable(file: Path) -> None:
    pipe, loop = file.with_name("pipe"), file.with_name("loop")
    os.mkfifo(pipe)
    loop.symlink_to(loop)
    for path, reason in (
        (pipe, "not a regular file"),
        (loop, "symbolic links"),
        (file / "x", "Not a"),
    ):
        with pytest.raises(ConfigUnreadable, match=reason):
            _read(path)


def test_an_open_file_is_replaced_where_it_was_found(file: Path, tmp_path: Path) -> None:
    with open_owned(file, _NEUTRON) as found:
        file.parent.rename(tmp_path / "moved")
        file.parent.symlink_to(tmp_path)
        write_atomic(found.path, b"changed", durable=True)
        assert found.read() == b"genuine"
    assert (tmp_path / "moved" / file.name).read_text() == "changed"
    assert not (tmp_path / file.name).exists()
