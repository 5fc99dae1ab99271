"""Files that are written, secrets and logs; and the files of sockets: whose they are, without asking there."""

import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from imdsproxy.errors import HostRefused, SecretUnreadable
from imdsproxy.host import socket_file
from imdsproxy.host.files import (
    MAX_SECRET_BYTES,
    ensure_directory,
    find_directory_holder,
    hold_directory,
    limit_log,
    open_log,
    read_secret,
    sweep_unfinished,
    write_atomic,
)
from imdsproxy.host.socket_file import (
    SocketFiles,
    SocketHolder,
    find_socket_holder,
    give_socket,
    identify_file,
    remove_file,
)
from imdsproxy.host.sockets import SocketOwners
from imdsproxy.host.state import ListeningSocket, SeenSocket, SocketState
from imdsproxy.model.entities import METADATA_IPV4
from support.umask import umask


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0o077, 0o000], ids=oct)
def _umask(request: pytest.FixtureRequest) -> Iterator[None]:
    with umask(request.param):
        yield


@pytest.mark.usefixtures("_umask")
def test_a_file_has_its_bytes_and_its_mode_whatever_the_umask_is(tmp_path: Path) -> None:
    write_atomic(tmp_path / "f", b"\0data\n", mode=0o644, durable=True)
    assert (tmp_path / "f").read_bytes() == b"\0data\n"
    assert _mode(tmp_path / "f") == 0o644
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_the_process_that_holds_a_directory_is_found(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with hold_directory(tmp_path):
        assert find_directory_holder(tmp_path) == os.getpid()
        assert find_directory_holder(tmp_path / "other") is None
    assert find_directory_holder(tmp_path) is None


def test_a_reader_beside_two_writers_sees_one_version_whole(tmp_path: Path) -> None:
    path = tmp_path / "f"
    versions = [bytes([number]) * 200_000 for number in range(2)]
    write_atomic(path, versions[0])

    def write(data: bytes) -> None:
        for _ in range(50):
            write_atomic(path, data)

    writers = [threading.Thread(target=write, args=(data,)) for data in versions]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert path.read_bytes() in versions
    assert [one.name for one in tmp_path.iterdir()] == ["f"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_atomic(path, b"old")
    limits = (
        "import resource, sys, signal\n"
        "from pathlib import Path\n"
        "from imdsproxy.host.files import write_atomic\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "write_atomic(Path(sys.argv[1]), bytes(5000))\n"
    )
    done = subprocess.run(
        (sys.executable, "-c", limits, str(path)), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "File too large (EFBIG)" in done.stderr
    assert path.read_bytes() == b"old"
    assert [one.name for one in tmp_path.iterdir()] == ["f"]


def test_what_killed_writers_left_is_swept_and_running_ones_keep_theirs(tmp_path: Path) -> None:
    gone = subprocess.Popen((sys.executable, "-c", ""))
    gone.wait()
    dead = tmp_path / f".record.{gone.pid}-77.tmp"
    alive = tmp_path / f".record.{os.getpid()}-77.tmp"
    others = [tmp_path / name for name in ("record", ".record", ".record.tmp", "a.1-1.tmp")]
    for path in (dead, alive, *others):
        path.touch()
    assert sweep_unfinished(tmp_path) == 1
    assert {*tmp_path.iterdir()} == {alive, *others}
    assert sweep_unfinished(tmp_path / "nowhere") == 0


@pytest.mark.usefixtures("_umask")
def test_a_directory_gets_exactly_its_mode_and_those_above_it_can_be_entered(
    tmp_path: Path,
) -> None:
    place = tmp_path / "a" / "b"
    for mode in (0o700, 0o2750):
        ensure_directory(place, mode=mode, owner=(os.getuid(), os.getgid()))
        assert (_mode(place.parent), _mode(place)) == (0o755, mode)


def _secret(tmp_path: Path, data: bytes, mode: int = 0o600, owner: int = -1) -> Path:
    path = tmp_path / "secret"
    path.write_bytes(data)
    path.chmod(mode)
    os.chown(path, owner, owner)
    return path


@pytest.mark.parametrize(
    ("data", "secret"),
    [(b"s3cret\n", b"s3cret"), (b"s3cret", b"s3cret"), (b"a\r\n", b"a"), (b" a \n\n", b" a \n")],
)
def test_a_secret_is_everything_but_the_newline_at_its_end(
    tmp_path: Path, data: bytes, secret: bytes
) -> None:
    assert read_secret(_secret(tmp_path, data)) == secret


@pytest.mark.root
@pytest.mark.parametrize(
    ("file", "message", "hint"),
    [
        *(((data, 0o600), "is empty", "put the secret") for data in (b"", b"\n", b"  \n")),
        *(((b"s", mode), f"mode {mode:04o}", "chmod") for mode in (0o604, 0o602, 0o777)),
        ((b"s", 0o600, 65534), "belongs to user 65534", "chown"),
        ((b"x" * (MAX_SECRET_BYTES + 1), 0o600), "has 65537 bytes", "at most"),
    ],
)
def test_a_secret_that_is_empty_huge_or_open_to_others_is_refused(
    tmp_path: Path, file: tuple[Any, ...], message: str, hint: str
) -> None:
    with pytest.raises(SecretUnreadable, match=message) as refused:
        read_secret(_secret(tmp_path, *file))
    assert hint in refused.value.hint


def test_what_is_no_file_is_no_secret(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name, message in (("none", "No such file"), ("", "not a reg"), ("pipe", "not a reg")):
        with pytest.raises(SecretUnreadable, match=message):
            read_secret(tmp_path / name)


def test_a_log_that_grew_too_long_begins_anew_and_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "haproxy.log"
    limit_log(path, 10)
    assert list(tmp_path.iterdir()) == []
    with os.fdopen(open_log(path), "ab", buffering=0) as log:
        log.write(b"0123456789")
        limit_log(path, 10)
        assert path.read_bytes() == b"0123456789"
        log.write(b"ab")
        limit_log(path, 10)
        log.write(b"new")
    assert path.read_bytes() == b"new"
    assert (tmp_path / "haproxy.log.1").read_bytes() == b"23456789ab"


def test_a_log_begins_anew_also_where_there_is_no_room_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "haproxy.log"
    path.write_bytes(b"0123456789")
    path.with_name("haproxy.log.1").mkdir()
    limit_log(path, 5)
    assert path.read_bytes() == b""


# Files of sockets

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
    with pytest.raises(HostRefused, match="no longer a socket"):
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
