"""The program without HAProxy: what it runs, what becomes of how that ends, and what it asks of the host."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest

from imdsproxy.app.namespace_proxy import (
    NetworkMetadataProxyHandler,
    ProxyDaemon,
    cleanup_config_file,
    main,
    proxy,
)
from imdsproxy.app.namespace_proxy.proxy import (
    Launch,
    claim_file,
    find_haproxy,
    make_directories,
    runs_with,
    try_to_bind,
)
from imdsproxy.errors import (
    ConfigRejected,
    HaproxyMissing,
    HostRefused,
    ImdsproxyError,
    PrivilegeMissing,
    RequestRefused,
)
from imdsproxy.host.files import write_atomic
from support.umask import umask

UUID: Final = "8f6a1e0c-3b52-4c1d-9a57-0d2f4b6c8e10"
PID: Final = 4711
_ALERT: Final = "[ALERT]    (12) : Binding for proxy metadata: cannot bind socket ({}).\n"


@dataclass
class FakeHaproxy:
    """In the place of a HAProxy that goes into the background.

    Attributes:
        failure: What running it raises.
        ended: Exit status and output of its first process.
        living: Pids of HAProxies that run with the proxy's configuration.
        done: The options that it was run with, and what else was done.
    """

    failure: BaseException | None = None
    ended: tuple[int, str] = (0, "")
    living: set[int] = field(default_factory=lambda: {PID})
    done: list[object] = field(default_factory=list)

    def run(self, launch: proxy.Launch, *more: str) -> tuple[int, str]:
        assert stat.S_ISREG(os.fstat(launch.lock).st_mode)
        self.done += [list(more), *(["alone"] if launch.alone else [])]
        if self.failure is not None:
            raise self.failure
        if self.ended[0] == 0:
            Path(more[-1]).write_text(f"{PID}\n")
        return self.ended

    def runs_with(self, pid: int, name: str) -> bool:
        assert name == f"{UUID}.conf"
        return pid in self.living

    def kill(self, pid: int, number: int) -> None:
        self.done.append((pid, number))


@pytest.fixture
def haproxy(monkeypatch: pytest.MonkeyPatch) -> FakeHaproxy:
    fake = FakeHaproxy()

    def run(launch: proxy.Launch, *more: str) -> tuple[int, str]:
        return fake.run(launch, *more)

    monkeypatch.setattr(proxy.Launch, "run", run)
    monkeypatch.setattr(proxy, "runs_with", fake.runs_with)
    monkeypatch.setattr(os, "kill", fake.kill)
    return fake


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Where the proxy's configuration goes."""
    return tmp_path / "ns-metadata-proxy" / f"{UUID}.conf"


def daemon(state: Path, pid_file: Path | None = None, **more: Any) -> ProxyDaemon:  # noqa: ANN401
    return ProxyDaemon(pid_file, "9697", UUID, state_path=state, **more)


def handler(state: Path, **more: Any) -> NetworkMetadataProxyHandler:  # noqa: ANN401
    return NetworkMetadataProxyHandler(None, UUID, state_path=state, **more)


# The handler


@pytest.mark.parametrize(
    ("own", "user", "group", "expected"),
    [
        (0, None, None, (None, None)),
        (0, "nobody", None, ("nobody", None)),
        (0, None, "nogroup", (None, "nogroup")),
        (0, "65534", "65534", ("nobody", "nogroup")),
        (65534, "nobody", "65534", (None, None)),
        (65534, "root", None, None),
        (65534, None, "root", None),
    ],
)
def test_root_takes_any_account_and_another_only_its_own(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    own: int,
    user: str | None,
    group: str | None,
    *,
    expected: tuple[str | None, str | None] | None,
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: own)
    monkeypatch.setattr(os, "getegid", lambda: own)
    asked = handler(tmp_path, user=user, group=group)
    if expected is None:
        with pytest.raises(PrivilegeMissing, match="cannot become"):
            asked.spec()
        return
    spec = asked.spec()
    assert (spec.user, spec.group) == expected


@pytest.mark.parametrize(
    ("members", "what"),
    [
        ({"unix_socket_path": "relative/sock"}, "no absolute path"),
        ({"state_path": "srv"}, "no absolute path"),
        ({"unix_socket_path": "/" + "s" * 107}, "too long"),
        ({"unix_socket_path": "/a\nb"}, "cannot take"),
    ],
)
def test_a_path_that_cannot_be_used_is_refused(members: Mapping[str, str], what: str) -> None:
    given: dict[str, Any] = {"state_path": "/srv", **members}
    with pytest.raises(RequestRefused, match=what):
        NetworkMetadataProxyHandler(UUID, None, **given).prepare()


# The daemon


@pytest.mark.usefixtures("haproxy")
@pytest.mark.parametrize("text", ["", "999\n", "garbage", "-1", "9" * 60, "1\n2\n"])
def test_a_pid_file_without_a_living_proxy_is_replaced(tmp_path: Path, text: str) -> None:
    (tmp_path / "p").write_text(text)
    daemon(tmp_path, tmp_path / "p").start()
    assert (tmp_path / "p").read_text() == f"{PID}\n"


@pytest.mark.parametrize(
    ("ended", "kind", "words"),
    [
        ((1, _ALERT.format("Address already in use")), HostRefused, "already in use"),
        ((1, _ALERT.format("Permission denied")), PrivilegeMissing, "Permission denied"),
        ((1, _ALERT.format("anything else")), ConfigRejected, "anything else"),
        # It ended at once.
        ((0, "[ALERT]    (1) : Cannot set uid 65534.\n"), ConfigRejected, "Cannot set uid"),
        ((0, ""), ConfigRejected, "wrote nothing"),
    ],
)
def test_a_haproxy_that_does_not_run_is_reported_in_its_words_and_leaves_no_pid(
    tmp_path: Path,
    haproxy: FakeHaproxy,
    config: Path,
    ended: tuple[int, str],
    *,
    kind: type[ImdsproxyError],
    words: str,
) -> None:
    own = config.with_suffix(".pid")
    own.parent.mkdir()
    # Of a start that was killed: not to be taken for success.
    own.write_text(f"{PID}\n")
    haproxy.ended = ended
    haproxy.living = {PID} if ended[0] else set()
    with pytest.raises(kind, match=words):
        daemon(tmp_path, tmp_path / "p").start()
    assert not own.exists()
    assert not (tmp_path / "p").exists()


def test_a_haproxy_whose_pid_cannot_be_written_is_ended(
    tmp_path: Path, haproxy: FakeHaproxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, data: bytes, *, mode: int) -> None:
        if path.name == "p":
            raise HostRefused("cannot write")
        write_atomic(path, data, mode=mode)

    monkeypatch.setattr(proxy, "write_atomic", refuse)
    with pytest.raises(HostRefused, match="cannot write"):
        daemon(tmp_path, tmp_path / "p").start()
    assert haproxy.done[-1] == (PID, 15)


# The command


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    status = main([str(one) for one in arguments])
    return status, capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "status", "line"),
    [
        ((), 64, "imdsproxy: the id of a network or of a router is needed"),
        (("--network-id", UUID, "--router-id", UUID), 64, "a router's id are given"),
        (("--network-id", "blue"), 64, "'blue' is no UUID"),
        (("--network-id", ""), 64, "'' is no UUID"),
        (("--network-id", UUID, "--metadata-port", "0"), 64, "'0' is no port"),
        (("--network-id", UUID, "--metadata-port", "70000"), 64, "'70000' is no port"),
        (("--nonsense",), 64, "unrecognized arguments: --nonsense"),
        (("--config-file", "/nonexistent/n"), 78, "cannot read /nonexistent/n"),
        (("--network-id", UUID, "--state-path", "/nonexistent/n"), 71, "for the metadata socket"),
        (("--network-id", UUID, "--metadata-proxy-user", "imdst-none"), 71, "no user imdst-none"),
        (("--network-id", UUID, "--metadata-proxy-group", "4294967200"), 71, "no group 4294967200"),
        (
            ("--network-id", UUID, "--pid-file", "/nonexistent/d/p"),
            71,
            "/nonexistent/d for the pid",
        ),
        (("cleanup", "../neutron"), 64, "'../neutron' is no UUID"),
    ],
)
def test_a_failure_is_a_line_a_hint_and_a_status(
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    status: int,
    line: str,
) -> None:
    ended, errors = command(capsys, *words)
    lines = errors.splitlines()
    assert ended == status
    assert line in lines[0]
    assert len(lines) <= 2
    assert all(one.startswith("hint: ") for one in lines[1:])


@pytest.mark.parametrize(
    ("failure", "status", "text"),
    [
        (
            OSError(errno.EIO, "Input/output error"),
            71,
            "imdsproxy: cannot be the proxy: Input/output error (EIO)\n",
        ),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_an_unforeseen_error_is_a_line_too_and_an_interruption_is_none(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    haproxy: FakeHaproxy,
    failure: BaseException,
    *,
    status: int,
    text: str,
) -> None:
    haproxy.failure = failure
    assert command(capsys, "--network-id", UUID, "--state-path", tmp_path) == (status, text)


def test_help_is_0(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["cleanup", "-h"]):
        assert main(words) == 0
        assert "--state-path DIR" in capsys.readouterr().out


# The host


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
        launch.run(deadline_s=0.2)
    Path(launch.program).write_text("\0")
    with pytest.raises(HaproxyMissing, match=f"cannot run {launch.program}"):
        launch.run()
    with pytest.raises(HaproxyMissing, match=f"cannot run {launch.program}"):
        launch.become()


def test_groups_that_cannot_be_given_up_are_no_missing_haproxy(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        # As of `setgroups` in the child; what cannot be executed has its name.
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(PrivilegeMissing, match="give up the supplementary groups"):
        launch.run("-c")


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
    with umask(request.param):
        yield


@pytest.mark.usefixtures("_umask")
def test_a_claimed_file_has_its_content_and_0640_whatever_the_umask_is(tmp_path: Path) -> None:
    path = tmp_path / "a.conf"
    os.close(claim_file(path, b"text"))
    assert path.read_bytes() == b"text"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert list(tmp_path.iterdir()) == [path]


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
    tmp_path: Path, config: Path
) -> None:
    config.parent.mkdir()
    config.touch()
    config.with_suffix(".pid").touch()
    config.with_name(".a.conf.4194304999-1.tmp").touch()
    assert cleanup_config_file(UUID, tmp_path)
    assert list(config.parent.iterdir()) == []
    assert not cleanup_config_file(UUID, tmp_path)
    assert not cleanup_config_file(UUID, tmp_path / "none")


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
