from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from imdsproxy.app.namespace_proxy.host import Ended, Host
from imdsproxy.errors import HaproxyMissing, HostRefused
from imdsproxy.host.account import group_name, user_name


@pytest.fixture
def descriptor() -> Iterator[int]:
    reader, writer = os.pipe()
    yield writer
    os.close(reader)
    os.close(writer)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_haproxy_is_found_on_the_path_or_where_an_agent_leaves_no_path(tmp_path: Path) -> None:
    (tmp_path / "a" / "haproxy").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "haproxy").touch()
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "haproxy").touch(mode=0o755)
    search = ":".join(["", *(str(tmp_path / name) for name in "abc")])
    assert Host().find_haproxy(search) == str(tmp_path / "c" / "haproxy")
    assert Path(Host().find_haproxy("")).name == "haproxy"


def test_a_program_is_run_apart_and_waited_for_until_all_that_write_for_it_let_go(
    descriptor: int,
) -> None:
    code = f"""if True:
        import os, sys, time
        os.fstat({descriptor})
        if os.fork(): sys.exit(3)
        time.sleep(0.3)
        print(os.getcwd(), os.umask(0), os.getgroups(), repr(sys.stdin.read()), file=sys.stderr)
        print(os.getsid(0) == os.getppid() or os.getsid(0) != {os.getsid(0)}, file=sys.stderr)"""
    assert Host().run(python(code), descriptor, alone=True) == Ended(3, "/ 23 [] ''\nTrue\n")


def test_a_program_that_hangs_or_cannot_be_run_is_reported(descriptor: int, tmp_path: Path) -> None:
    code = "import time; time.sleep(60)"
    with pytest.raises(HostRefused, match=r"has not come up within 0\.2 s"):
        Host().run(python(code), descriptor, alone=False, deadline_s=0.2)
    (tmp_path / "haproxy").write_text("\0")
    for path in (tmp_path / "none", tmp_path / "haproxy"):
        with pytest.raises(HaproxyMissing, match=f"cannot run {path}"):
            Host().run([str(path)], descriptor, alone=False)
        with pytest.raises(HaproxyMissing, match=f"cannot run {path}"):
            Host().become([str(path)])


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
    assert Host().runs_with(7, "u.conf", proc=tmp_path) is known
    assert not Host().runs_with(os.getpid(), "u.conf")


def test_a_port_in_use_is_reported_however_it_was_bound() -> None:
    for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, option, 1)
            other.bind(("127.0.0.1", 0))
            other.listen()
            port = other.getsockname()[1]
            for dual_stack in (False, True):
                with pytest.raises(HostRefused, match=f"port {port}: Address already in use"):
                    Host().try_to_bind(port, dual_stack=dual_stack)
        Host().try_to_bind(port, dual_stack=True)


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
