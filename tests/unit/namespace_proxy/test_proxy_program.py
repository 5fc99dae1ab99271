"""The program without HAProxy: what it runs, and what becomes of how that ends."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest

from imdsproxy.app.namespace_proxy import NetworkMetadataProxyHandler, ProxyDaemon, main, proxy
from imdsproxy.errors import (
    ConfigRejected,
    HostRefused,
    ImdsproxyError,
    PrivilegeMissing,
    RequestRefused,
)
from imdsproxy.host.files import write_atomic

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

    def run(self, launch: proxy.Launch, *more: str, alone: bool) -> tuple[int, str]:
        assert stat.S_ISREG(os.fstat(launch.lock).st_mode)
        self.done += [list(more), *(["alone"] if alone else [])]
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


@pytest.fixture(autouse=True)
def haproxy(monkeypatch: pytest.MonkeyPatch) -> FakeHaproxy:
    fake = FakeHaproxy()

    def run(launch: proxy.Launch, *more: str, alone: bool) -> tuple[int, str]:
        return fake.run(launch, *more, alone=alone)

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
