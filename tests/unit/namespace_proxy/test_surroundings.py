from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from imdsproxy.app.namespace_proxy.host import (
    find_haproxy,
    run_to_end,
    runs_with,
    try_to_bind,
)
from imdsproxy.errors import HaproxyMissing, HostRefused
from imdsproxy.host.files import group_name, user_name


@pytest.fixture
def descriptor() -> Iterator[int]:
    reader, writer = os.pipe()
    yield writer
    os.close(reader)
    os.close(writer)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_haproxy_is_found_on_the_path_first(tmp_path: Path) -> None:
    (tmp_path / "a" / "haproxy").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "haproxy").touch()
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "haproxy").touch(mode=0o755)
    search = ":".join(["", *(str(tmp_path / name) for name in "abc")])
    assert find_haproxy(search) == str(tmp_path / "c" / "haproxy")


def test_haproxy_is_found_where_an_agent_leaves_no_path() -> None:
    found = find_haproxy("")
    assert found is not None
    assert Path(found).name == "haproxy"


def test_a_program_is_run_apart_and_all_that_it_says_is_kept(descriptor: int) -> None:
    ended = run_to_end(
        python(
            "import os,sys\n"
            f"os.fstat({descriptor})\n"
            "print(os.getcwd(), os.getsid(0) == os.getpid(), os.umask(0), os.getgroups())\n"
            "print(sys.stdin.read() == '', file=sys.stderr)\n"
            "sys.exit(3)"
        ),
        descriptor,
        alone=True,
    )
    assert (ended.status, ended.output, ended.errors) == (3, "/ True 23 []\n", "True\n")


def test_it_is_waited_for_until_whoever_writes_for_it_lets_go(descriptor: int) -> None:
    ended = run_to_end(
        python(
            "import os,sys,time\n"
            "if os.fork(): sys.exit(0)\n"
            "time.sleep(0.3)\n"
            "print('late', file=sys.stderr)"
        ),
        descriptor,
        alone=False,
    )
    assert (ended.status, ended.errors) == (0, "late\n")


def test_a_program_that_hangs_is_ended(descriptor: int) -> None:
    with pytest.raises(HostRefused, match=r"has not come up within 0\.2 s"):
        run_to_end(
            python("import time; time.sleep(60)"), descriptor, alone=False, deadline_s=0.2
        )  # fmt: skip


def test_a_program_that_cannot_be_run_is_told(descriptor: int, tmp_path: Path) -> None:
    (tmp_path / "haproxy").write_text("\0")
    for path in (tmp_path / "none", tmp_path / "haproxy"):
        with pytest.raises(HaproxyMissing, match=f"cannot run {path}"):
            run_to_end([str(path)], descriptor, alone=False)


def test_a_proxy_is_known_by_its_program_and_its_configuration(tmp_path: Path) -> None:
    def process(pid: int, *words: str) -> int:
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "cmdline").write_text("".join(f"{word}\0" for word in words))
        return pid

    def knows(pid: int) -> bool:
        return runs_with(pid, "u.conf", proc=tmp_path)

    assert knows(process(1, "/usr/sbin/haproxy", "-f", "/srv/ns-metadata-proxy/u.conf"))
    assert knows(process(2, "haproxy", "-f", "/elsewhere/u.conf", "-D"))
    assert not knows(process(3, "haproxy", "-f", "/srv/v.conf"))
    assert not knows(process(4, "vim", "/srv/u.conf"))
    assert not knows(process(5))
    assert not knows(6)


def test_a_real_process_is_looked_at() -> None:
    assert not runs_with(os.getpid(), "u.conf")


def test_a_port_in_use_is_told_whoever_has_it_and_how_ever_it_was_bound() -> None:
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


def test_accounts_are_known_by_name_and_by_id() -> None:
    assert user_name("0") == user_name("root") == "root"
    assert group_name("0") == group_name("root") == "root"


@pytest.mark.parametrize("word", ["nobody-of-that-name", "4294967290", "9" * 30, "-1", ""])
def test_an_account_that_is_not_there_is_told(word: str) -> None:
    with pytest.raises(HostRefused, match=f"there is no user {word}"):
        user_name(word)
    with pytest.raises(HostRefused, match=f"there is no group {word}"):
        group_name(word)


def test_the_program_loads_nothing_of_the_daemon() -> None:
    code = "import sys, imdsproxy.app.namespace_proxy; print(*sorted(sys.modules))"
    done = subprocess.run(python(code), capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    heavy = ("asyncio", "pydantic", "typer", "rich", "yaml", "uvicorn", "fastapi", "structlog")
    assert [name for name in loaded if name.partition(".")[0] in heavy] == []
    ours = {name.split(".")[1] for name in loaded if name.startswith("imdsproxy.")}
    assert ours == {"app", "core", "errors", "host"}
