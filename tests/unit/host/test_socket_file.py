from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from imdsproxy.core.hoststate import ListeningSocket, SeenSocket, SocketState
from imdsproxy.core.model import METADATA_IPV4
from imdsproxy.errors import HostRefused
from imdsproxy.host import socket_file
from imdsproxy.host.socket_file import (
    SocketFiles,
    SocketHolder,
    find_socket_holder,
    give_socket,
    identify_file,
    remove_file,
)
from imdsproxy.host.sockets import SocketOwners

_US = os.getpid()


@contextmanager
def _listening(path: Path, *, moved_to: Path | None = None) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        if moved_to is not None:
            path.rename(moved_to)
        yield listener


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metadata_proxy"


def _look(path: Path, *pids: int) -> SeenSocket:
    return SocketFiles().observe(path, pids)


def _asked(listener: socket.socket) -> bool:
    listener.settimeout(0)
    try:
        listener.accept()[0].close()
    except BlockingIOError:
        return False
    return True


def test_a_path_is_free_stale_or_occupied(path: Path) -> None:
    assert _look(path) == SeenSocket(SocketState.MISSING)
    with _listening(path):
        pass
    assert _look(path, _US) == SeenSocket(SocketState.STALE)
    assert find_socket_holder(path) is None
    path.unlink()
    path.symlink_to("/dev/log")
    assert _look(path) == SeenSocket(SocketState.OCCUPIED)
    path.unlink()
    path.mkdir()
    assert _look(path) == SeenSocket(SocketState.OCCUPIED)
    assert _look(path / "below") == SeenSocket(SocketState.MISSING)


@pytest.mark.parametrize("renamed", [False, True])
def test_whose_it_is_is_found_without_connecting(path: Path, *, renamed: bool) -> None:
    bound = path.with_name(f"{path.name}.123.tmp") if renamed else path
    with _listening(bound, moved_to=path if renamed else None) as listener:
        assert _look(path, _US) == SeenSocket(SocketState.OURS)
        seen = _look(path, 1)
        assert (seen.state, [one.pid for one in seen.owners]) == (SocketState.FOREIGN, [_US])
        assert seen.owners[0].command == Path("/proc/self/comm").read_text().strip()
        assert not _asked(listener)


def test_a_socket_of_ours_that_is_not_at_its_path_any_more_is_orphaned(path: Path) -> None:
    with _listening(path):
        files = SocketFiles()
        assert files.observe(path, (_US,)).state is SocketState.OURS
        path.unlink()
        assert files.observe(path, (_US,)) == SeenSocket(SocketState.MISSING, orphaned=True)
        path.touch()
        assert files.observe(path, (_US,)) == SeenSocket(SocketState.OCCUPIED, orphaned=True)
        assert files.observe(path, ()) == SeenSocket(SocketState.OCCUPIED)


def test_where_the_kernel_does_not_tell_a_connection_does(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket_file, "_listening", list)
    with _listening(path) as listener:
        assert _look(path, _US) == SeenSocket(SocketState.OURS)
        assert _asked(listener)
        seen = _look(path, 1)
        assert (seen.state, [one.pid for one in seen.owners]) == (SocketState.FOREIGN, [_US])
    assert _look(path, _US) == SeenSocket(SocketState.STALE)


def test_a_full_queue_is_a_sign_of_life(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket_file, "_listening", list)
    monkeypatch.setattr(socket_file, "_PATIENCE_S", 0.05)
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as waiting:
        listener.bind(str(path))
        listener.listen(0)
        waiting.connect(str(path))
        assert _look(path) == SeenSocket(SocketState.FOREIGN)
        assert find_socket_holder(path) == SocketHolder()


def test_a_file_on_another_device_is_not_taken_for_it_by_its_number(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _listening(path):
        pass
    other = socket_file._Listening(1, b"/elsewhere", path.stat().st_ino, 0)
    monkeypatch.setattr(socket_file, "_listening", lambda: [other])
    assert _look(path) == SeenSocket(SocketState.STALE)


def test_a_socket_that_was_handed_on_has_its_holder_also_where_devices_differ(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on btrfs, with a HAProxy whose first worker has ended."""
    known = socket_file._listening
    monkeypatch.setattr(
        socket_file, "_listening", lambda: [replace(one, device=0) for one in known()]
    )
    program = (
        f"import os, socket, sys; s = socket.socket(socket.AF_UNIX); s.bind({str(path)!r}); s.listen()\n"
        "if not os.fork(): print(os.getpid(), flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        (sys.executable, "-c", program), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as first:
        assert first.stdout is not None
        worker = int(first.stdout.readline())
        assert first.wait() == 0
        found = find_socket_holder(path)
        assert found == SocketHolder(worker, (sys.executable, "-c", program))


def test_a_link_that_came_meanwhile_gives_nothing_away(path: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.touch(mode=0o600)
    path.symlink_to(secret)
    with pytest.raises(HostRefused, match="no socket any more"):
        give_socket(path, mode=0o666, owner=(65534, 65534))
    assert (stat.S_IMODE(secret.stat().st_mode), secret.stat().st_uid) == (0o600, os.getuid())


def test_the_file_that_was_looked_at_is_removed(path: Path) -> None:
    with _listening(path):
        file = identify_file(path)
        assert file is not None
        remove_file(path, file)
    assert list(path.parent.iterdir()) == []
    assert identify_file(path) is None
    remove_file(path, file)


def test_a_file_that_was_bound_since_is_kept(path: Path) -> None:
    with _listening(path.with_name("before")):
        old = identify_file(path.with_name("before"))
    assert old is not None
    path.with_name("before").unlink()
    with _listening(path) as agent:
        file = identify_file(path)
        remove_file(path, (old[0], old[1] + 1, *old[2:]))
        assert identify_file(path) == file
        assert list(path.parent.iterdir()) == [path]
        with socket.socket(socket.AF_UNIX) as guest:
            guest.connect(str(path))
        assert _asked(agent)


_CONFIG = Path("/run/imdsproxy/haproxy.cfg")
_SOCKET = ListeningSocket(METADATA_IPV4, 80, None, 55)


@pytest.mark.parametrize(
    ("config", "ours"), [(_CONFIG, True), (Path("/etc/haproxy/haproxy.cfg"), False)]
)
def test_a_haproxy_with_our_configuration_is_ours_before_its_pids_are_known(
    tmp_path: Path, config: Path, *, ours: bool
) -> None:
    process = tmp_path / "4711"
    (process / "fd").mkdir(parents=True)
    (process / "fd/3").symlink_to("socket:[55]")
    (process / "cmdline").write_bytes(b"\0".join((b"haproxy", b"-W", b"-f", bytes(config), b"")))
    (process / "comm").write_text("haproxy\n")
    (process / "stat").write_text("4711 (haproxy) S 1 " + "0 " * 20)

    found = SocketOwners(tmp_path, _CONFIG).resolve([_SOCKET], our_pids=[12])

    assert found[55].ours == ours
    assert [owner.pid for owner in found[55].owners] == [4711]
