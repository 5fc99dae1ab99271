from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from imdsproxy.core.model import InstanceId
from imdsproxy.core.token_report import GuestWithoutToken, ReaderWithoutToken, TokenReport
from support.admin_server import admin_server


def _on_a_terminal(argv: list[str], environment: dict[str, str], columns: int = 80) -> str:
    """What a program writes to a terminal."""
    controller, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, columns))
    kept = {name: os.environ[name] for name in ("PATH",) if name in os.environ}
    with subprocess.Popen(
        argv,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env={**kept, "TERM": "xterm-256color", **environment},
    ) as process:
        os.close(terminal)
        written = b""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if not select.select([controller], [], [], 0.2)[0]:
                continue
            try:
                chunk = os.read(controller, 65536)
            except OSError:  # EIO: the program has closed the terminal
                break
            written += chunk
        process.wait(10)
    os.close(controller)
    return written.decode()


def _plain(written: str) -> list[str]:
    return [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in written.splitlines()]


@pytest.mark.parametrize(
    ("environment", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
def test_colour_is_for_terminals_that_want_it(
    tmp_path: Path, environment: dict[str, str], *, coloured: bool
) -> None:
    with admin_server(tmp_path) as server:
        argv = [sys.executable, "-m", "imdsproxy", "--socket", str(server.socket), "status"]
        written = _on_a_terminal(argv, environment)

    assert "ready" in written
    assert ("\x1b[3" in written) is coloured


def test_tables_fit_a_terminal_and_never_break_an_id(tmp_path: Path) -> None:
    with admin_server(tmp_path) as server:
        network = "5f6a1d0e-7d0f-4a53-9d5f-0d4b5c1f7a10"
        body = {"id": network, "name": "n" * 60, "listener": {"namespace": f"qdhcp-{network}"}}
        server.client.request("POST", "/v1/networks", body=body)
        argv = [sys.executable, "-m", "imdsproxy", "--socket", str(server.socket)]
        written = _on_a_terminal([*argv, "network", "list"], {"NO_COLOR": "1"})

    assert max(len(line) for line in _plain(written)) <= 80
    assert network in written
    assert "serving" in written


def test_a_posted_password_cannot_steer_a_terminal(tmp_path: Path) -> None:
    with admin_server(tmp_path) as server:
        body = {"id": "web", "name": "web"}
        server.client.request("POST", "/v1/instances", body=body)
        server.passwords.keep(InstanceId("web"), b"abc\x1b]0;owned\x07")
        argv = [sys.executable, "-m", "imdsproxy", "--socket", str(server.socket)]
        shown = _on_a_terminal([*argv, "instance", "password", "web"], {})
    assert shown.splitlines() == ["abc\\x1b]0;owned\\x07"]


def test_on_a_narrow_terminal_spare_columns_are_left_out(tmp_path: Path) -> None:
    with admin_server(tmp_path) as server:
        for name in ("short", "n" * 60):
            body = {"id": "blue", "name": name, "listener": {"namespace": "qdhcp-blue"}}
            server.client.request("PUT", "/v1/networks/blue", body=body)
            argv = [sys.executable, "-m", "imdsproxy", "--socket", str(server.socket)]
            written = _on_a_terminal([*argv, "network", "list"], {})
            assert ("SOURCE" in written) is (name == "short")


def _clients(*paths: str) -> tuple[ReaderWithoutToken, ...]:
    return tuple(
        ReaderWithoutToken(path, "Boto3/1.34.0_md/Botocore#1.34.0_ua/2.0_os/linux#6.1.0", 3, 0, 1_795_000_000.0)
        for path in paths
    )  # fmt: skip


_LONG = "5f6a1d0e-7d0f-4a53-9d5f-0d4b5c1f7a10"
_TOLD = TokenReport(
    1_794_990_000.0,
    (
        GuestWithoutToken("blue", "web-1", 120, 0, 1_795_000_000.0, _clients("latest/user-data", "latest/meta-data")),
        GuestWithoutToken(_LONG, "i-" + "9" * 62, 0, 123_456, 1_794_999_000.0, _clients("latest/meta-data/placement")),
        GuestWithoutToken("red", "db", 20, 0, 1_794_998_000.0, ()),
    ),
    (),
    0,
    one_in=20,
)  # fmt: skip


@pytest.mark.parametrize("columns", [80, 160])
@pytest.mark.parametrize("words", [("token", "report"), ("tokens", "report")])
def test_the_token_report_fits_a_terminal(
    tmp_path: Path, columns: int, words: tuple[str, ...]
) -> None:
    with admin_server(tmp_path) as server:
        server.token_report = _TOLD
        argv = [sys.executable, "-m", "imdsproxy", "--socket", str(server.socket), *words]
        lines = _plain(_on_a_terminal(argv, {"NO_COLOR": "1"}, columns))
    assert max(len(line) for line in lines) <= columns
    whole = " ".join(" ".join(lines).split())
    for told in (
        "web-1 ~120 0 /latest/",
        "0 123456 /latest/",
        "red db ~20 0 - -",
        "one read in 20 is counted",
    ):
        assert told in whole
    assert (_LONG in whole) is (columns > 80)


@pytest.mark.parametrize(
    ("one_in", "told"),
    [
        (20, "no read without a token was seen"),
        (1, "no read without a token was seen"),
        (0, "only refused reads are counted"),
    ],
)
def test_a_token_report_of_nobody_says_since_when_and_what_is_counted(
    tmp_path: Path, one_in: int, told: str
) -> None:
    with admin_server(tmp_path) as server:
        server.token_report = TokenReport(1_795_000_000.0, (), (), 0, one_in)
        argv = [
            sys.executable,
            "-m",
            "imdsproxy",
            "--socket",
            str(server.socket),
            "token",
            "report",
        ]
        lines = _plain(_on_a_terminal(argv, {"NO_COLOR": "1", "TZ": "UTC"}))
    shown = " ".join(lines)
    assert "since 2026-11-18 11:06:40" in shown
    assert told in shown
    assert ("one read in 20" in shown) is (one_in == 20)
