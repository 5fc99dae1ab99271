"""What the program asks of the host: HAProxy, ports, the lock on its file, directories."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from imdsproxy.app.namespace_proxy.proxy import (
    Launch,
    claim_file,
    find_haproxy,
    make_directories,
    remove_unclaimed,
    runs_with,
    try_to_bind,
)
from imdsproxy.errors import HaproxyMissing, HostRefused


def test_haproxy_is_found_on_the_path_or_where_an_agent_leaves_no_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a" / "haproxy").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "haproxy").touch()
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "haproxy").touch(mode=0o755)
    monkeypatch.setenv("PATH", ":".join(["", *(str(tmp_path / name) for name in "abc")]))
    assert find_haproxy() == str(tmp_path / "c" / "haproxy")
    monkeypatch.setenv("PATH", "")
    assert Path(find_haproxy()).name == "haproxy"


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """A shell script in HAProxy's place, `haproxy`, which a test writes."""
    program = tmp_path / "haproxy"
    program.touch(mode=0o755)
    lock = os.open(tmp_path, os.O_RDONLY)
    yield Launch(str(program), tmp_path / "u.conf", lock, alone=False)
    os.close(lock)


def test_a_haproxy_that_hangs_or_cannot_be_run_is_reported(launch: Launch) -> None:
    Path(launch.program).write_text("#!/bin/sh\nsleep 60 & sleep 60")
    with pytest.raises(HostRefused, match=r"has not come up within 0\.2 s"):
        launch.run(alone=False, deadline_s=0.2)
    Path(launch.program).write_text("\0")
    with pytest.raises(HaproxyMissing, match=f"cannot run {launch.program}"):
        launch.run(alone=False)
    with pytest.raises(HaproxyMissing, match=f"cannot run {launch.program}"):
        launch.become()


@pytest.mark.parametrize(
    ("words", "known"),
    [
        (("/usr/sbin/haproxy", "-f", "/srv/ns-metadata-proxy/u.conf"), True),
        (("haproxy", "-f", "/elsewhere/u.conf", "-D"), True),
        (("haproxy", "-f", "/srv/v.conf"), False),
        (("vim", "/srv/u.conf"), False),
        ((), False),
        (None, False),
    ],
)
def test_a_proxy_is_known_by_its_program_and_its_configuration(
    tmp_path: Path, words: tuple[str, ...] | None, *, known: bool
) -> None:
    if words is not None:
        (tmp_path / "7").mkdir()
        (tmp_path / "7" / "cmdline").write_text("".join(f"{word}\0" for word in words))
    assert runs_with(7, "u.conf", proc=tmp_path) is known
    assert not runs_with(os.getpid(), "u.conf")


def test_a_port_in_use_is_reported_however_it_was_bound() -> None:
    for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, option, 1)
            other.bind(("127.0.0.1", 0))
            other.listen()
            port = other.getsockname()[1]
            for dual_stack in (False, True):
                with pytest.raises(HostRefused, match=f"port {port}: Address already in use"):
                    try_to_bind(port, dual_stack=dual_stack)
        try_to_bind(port, dual_stack=True)


def test_the_program_loads_nothing_of_the_daemon() -> None:
    code = "import sys, imdsproxy.app.namespace_proxy; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    heavy = ("asyncio", "pydantic", "typer", "rich", "yaml", "uvicorn", "fastapi", "structlog")
    assert [name for name in loaded if name.partition(".")[0] in heavy] == []
    ours = {name.split(".")[1] for name in loaded if name.startswith("imdsproxy.")}
    assert ours == {"app", "core", "errors", "host"}


# The configuration's file


@pytest.fixture(params=[0, 0o077], ids=["umask 0", "umask 077"])
def _umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


@pytest.mark.usefixtures("_umask")
def test_a_claimed_file_has_its_content_and_0640_whatever_the_umask_is(tmp_path: Path) -> None:
    path = tmp_path / "a.conf"
    os.close(claim_file(path, b"text"))
    assert path.read_bytes() == b"text"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_in_use_is_neither_replaced_nor_removed(tmp_path: Path) -> None:
    path = tmp_path / "a.conf"
    lock = claim_file(path, b"one")
    with pytest.raises(HostRefused, match="is in use"):
        claim_file(path, b"two")
    with pytest.raises(HostRefused, match="is in use"):
        remove_unclaimed(path)
    assert path.read_bytes() == b"one"
    os.close(lock)


def test_of_many_that_want_a_file_one_gets_it(tmp_path: Path) -> None:
    for turn in range(30):
        path = tmp_path / f"{turn}.conf"
        if turn % 2:
            path.write_bytes(b"old")

        def claim(number: int, path: Path = path) -> tuple[int, int] | None:
            try:
                return number, claim_file(path, b"%d" % number)
            except HostRefused:
                return None

        with ThreadPoolExecutor(8) as pool:
            got = [one for one in pool.map(claim, range(8)) if one is not None]
        assert len(got) == 1
        assert path.read_bytes() == b"%d" % got[0][0]
        os.close(got[0][1])


def test_a_file_that_is_replaced_while_it_is_locked_is_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.conf"
    path.write_bytes(b"old")
    others: list[int] = []
    lock = fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        if not others:
            # Another process was faster between our opening and our locking.
            others.append(-1)
            others.append(claim_file(path, b"theirs"))
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(HostRefused, match="in use"):
        claim_file(path, b"ours")
    assert path.read_bytes() == b"theirs"
    os.close(others[1])


def test_removing_takes_what_killed_writers_left_and_says_whether_the_file_was_there(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.conf"
    path.touch()
    path.with_suffix(".pid").touch()
    (tmp_path / ".a.conf.4194304999-1.tmp").touch()
    assert remove_unclaimed(path)
    assert list(tmp_path.iterdir()) == []
    assert not remove_unclaimed(path)
    assert not remove_unclaimed(tmp_path / "none" / "a.conf")


def test_a_file_that_cannot_be_written_is_reported_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HostRefused, match=r"cannot write .*a\.conf: Not a directory"):
        claim_file(tmp_path / "file" / "a.conf", b"")
    (tmp_path / "a.conf").mkdir()
    with pytest.raises(HostRefused, match=r"cannot write .*a\.conf: Is a directory"):
        claim_file(tmp_path / "a.conf", b"")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "a.conf"}


def test_a_file_that_cannot_be_completed_is_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "old.conf").write_bytes(b"old")
    monkeypatch.setattr(os, "write", full)
    for name in ("old.conf", "new.conf"):
        with pytest.raises(HostRefused, match="No space left"):
            claim_file(tmp_path / name, b"text")
    assert [path.name for path in tmp_path.iterdir()] == ["old.conf"]
    assert (tmp_path / "old.conf").read_bytes() == b"old"


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "a.conf").symlink_to(tmp_path / "other")
    with pytest.raises(HostRefused):
        claim_file(tmp_path / "a.conf", b"")
    assert not (tmp_path / "other").exists()


@pytest.mark.usefixtures("_umask")
def test_directories_are_0755_or_tighter_whatever_the_umask_is(tmp_path: Path) -> None:
    make_directories(tmp_path / "a" / "b")
    for path in (tmp_path / "a", tmp_path / "a" / "b"):
        assert stat.S_IMODE(path.stat().st_mode) & ~0o755 == 0


@pytest.mark.parametrize(("before", "after"), [(0o777, 0o755), (0o770, 0o750), (0o700, 0o700)])
def test_a_directory_that_others_may_write_to_is_tightened(
    before: int, after: int, tmp_path: Path
) -> None:
    path = tmp_path / "a"
    path.mkdir()
    path.chmod(before)
    make_directories(path)
    assert stat.S_IMODE(path.stat().st_mode) == after


def test_a_directory_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "b"):
        with pytest.raises(HostRefused, match="cannot create the directory") as refused:
            make_directories(path)
        assert "--state-path" in refused.value.hint
