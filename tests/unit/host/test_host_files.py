from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from imdsproxy.errors import HostRefused, SecretUnreadable
from imdsproxy.host.files import (
    MAX_SECRET_BYTES,
    ensure_directory,
    limit_log,
    open_log,
    read_secret,
    sweep_unfinished,
    write_atomic,
)


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o077, 0o000])
def test_a_file_has_its_bytes_and_its_mode_whatever_the_umask_is(
    tmp_path: Path, umask: int
) -> None:
    before = os.umask(umask)
    try:
        write_atomic(tmp_path / "f", b"\0data\n", mode=0o644, durable=True)
    finally:
        os.umask(before)
    assert (tmp_path / "f").read_bytes() == b"\0data\n"
    assert _mode(tmp_path / "f") == 0o644
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_reader_sees_all_of_the_old_bytes_or_all_of_the_new(tmp_path: Path) -> None:
    path = tmp_path / "f"
    versions = [bytes([number]) * 300_000 for number in range(4)]
    write_atomic(path, versions[0])
    stop = threading.Event()
    seen: set[bytes] = set()

    def read() -> None:
        while not stop.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(100):
        write_atomic(path, versions[number % 4])
    stop.set()
    reader.join()
    assert seen <= set(versions)


def test_two_threads_that_write_one_file_do_not_mix_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "f"
    versions = [bytes([number]) * 200_000 for number in range(2)]

    def write(data: bytes) -> None:
        for _ in range(50):
            write_atomic(path, data)
            assert path.read_bytes() in versions

    writers = [threading.Thread(target=write, args=(data,)) for data in versions]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
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


def test_a_directory_that_is_missing_is_told_of_with_its_errno(tmp_path: Path) -> None:
    with pytest.raises(HostRefused, match=r"cannot write .*/nowhere/f: .*ENOENT"):
        write_atomic(tmp_path / "nowhere" / "f", b"")


def test_what_killed_writers_left_is_swept_and_living_ones_keep_theirs(tmp_path: Path) -> None:
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


def test_a_directory_gets_exactly_its_mode_and_may_exist(tmp_path: Path) -> None:
    place = tmp_path / "a" / "b"
    for mode in (0o700, 0o2750):
        ensure_directory(place, mode=mode, owner=(os.getuid(), os.getgid()))
        assert _mode(place) == mode


def test_directories_above_one_that_is_made_can_be_entered_whatever_the_umask_is(
    tmp_path: Path,
) -> None:
    tmp_path.chmod(0o700)
    before = os.umask(0o077)
    try:
        ensure_directory(tmp_path / "a" / "b" / "c", mode=0o710)
    finally:
        os.umask(before)
    assert [_mode(tmp_path / one) for one in ("", "a", "a/b", "a/b/c")] == [
        *(0o700, 0o755, 0o755, 0o710)
    ]


def test_a_file_in_the_place_of_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    with pytest.raises(HostRefused, match="EEXIST"):
        ensure_directory(tmp_path / "f")


def _secret(tmp_path: Path, data: bytes, mode: int = 0o600) -> Path:
    path = tmp_path / "secret"
    path.write_bytes(data)
    path.chmod(mode)
    return path


@pytest.mark.parametrize(
    ("data", "secret"),
    [(b"s3cret\n", b"s3cret"), (b"s3cret", b"s3cret"), (b"a\r\n", b"a"), (b" a \n\n", b" a \n")],
)
def test_a_secret_is_everything_but_the_newline_at_its_end(
    tmp_path: Path, data: bytes, secret: bytes
) -> None:
    assert read_secret(_secret(tmp_path, data)) == secret


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o777])
def test_a_secret_that_everybody_can_read_or_write_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(SecretUnreadable, match=f"has mode {mode:04o}") as refused:
        read_secret(_secret(tmp_path, b"s", mode))
    assert "chmod" in refused.value.hint


@pytest.mark.parametrize("data", [b"", b"\n", b"  \n"])
def test_an_empty_secret_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(SecretUnreadable, match="is empty"):
        read_secret(_secret(tmp_path, data))


def test_a_secret_that_is_missing_a_directory_a_pipe_or_huge_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SecretUnreadable, match="No such file"):
        read_secret(tmp_path / "nowhere")
    with pytest.raises(SecretUnreadable, match="not a regular file"):
        read_secret(tmp_path)
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(SecretUnreadable, match="not a regular file"):
        read_secret(tmp_path / "pipe")
    with pytest.raises(SecretUnreadable, match="at most"):
        read_secret(_secret(tmp_path, b"x" * (MAX_SECRET_BYTES + 1)))


@pytest.mark.root
def test_a_secret_of_another_user_is_refused(tmp_path: Path) -> None:
    path = _secret(tmp_path, b"s")
    os.chown(path, 65534, 65534)
    with pytest.raises(SecretUnreadable, match="belongs to user 65534"):
        read_secret(path)


def test_a_log_that_grew_too_long_begins_anew_and_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "haproxy.log"
    with os.fdopen(open_log(path), "ab", buffering=0) as log:
        log.write(b"0123456789")
        limit_log(path, 10)
        assert path.read_bytes() == b"0123456789"
        log.write(b"ab")
        limit_log(path, 10)
        log.write(b"new")
    assert path.read_bytes() == b"new"
    assert (tmp_path / "haproxy.log.1").read_bytes() == b"23456789ab"


def test_a_log_begins_anew_also_where_there_is_no_room_for_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_words: object, **_named: object) -> None:
        raise HostRefused("no space left on device")

    path = tmp_path / "haproxy.log"
    path.write_bytes(b"0123456789")
    monkeypatch.setattr("imdsproxy.host.files.write_atomic", refuse)
    limit_log(path, 5)
    assert path.read_bytes() == b""


def test_where_there_is_no_log_there_is_nothing_to_limit(tmp_path: Path) -> None:
    limit_log(tmp_path / "none.log", 5)
    assert list(tmp_path.iterdir()) == []
