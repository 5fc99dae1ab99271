from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from imdsproxy.errors import SecretUnreadable
from imdsproxy.host.files import (
    MAX_SECRET_BYTES,
    ensure_directory,
    limit_log,
    open_log,
    read_secret,
    sweep_unfinished,
    write_atomic,
)
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
