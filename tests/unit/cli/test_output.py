"""What commands print on a terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Mapping

import pytest

from imdsproxy.core.model import InstanceId, NetworkId
from imdsproxy.core.token_report import GuestWithoutToken, OpenTree, ReaderWithoutToken, TokenReport
from support.cli import Cli

_AT = 1_795_000_000.0
_LONG = "5f6a1d0e-7d0f-4a53-9d5f-0d4b5c1f7a10"


def _on_a_terminal(
    cli: Cli, command: str, columns: int = 80, environment: Mapping[str, str] | None = None
) -> list[str]:
    """The lines that a command writes to a terminal."""
    controller, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, columns))
    kept = {name: os.environ[name] for name in ("PATH",) if name in os.environ}
    socket = str(cli.server.socket)
    with subprocess.Popen(
        [sys.executable, "-m", "imdsproxy", "--socket", socket, *command.split()],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env={**kept, "TERM": "xterm-256color", **(environment or {})},
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
    return written.decode().splitlines()


def _plain(lines: list[str]) -> list[str]:
    return [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines]


@pytest.mark.parametrize(
    ("environment", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
def test_colour_is_for_terminals_that_want_it(
    cli: Cli, environment: dict[str, str], *, coloured: bool
) -> None:
    written = "\n".join(_on_a_terminal(cli, "status", environment=environment))
    assert "ready" in written
    assert ("\x1b[3" in written) is coloured


@pytest.mark.parametrize(("name", "spare"), [("short", True), ("n" * 60, False)])
def test_tables_fit_a_terminal_without_spare_columns_and_never_break_an_id(
    cli: Cli, name: str, *, spare: bool
) -> None:
    cli("network", "add", _LONG[:13], "--name", name, "--namespace", "qdhcp-blue")
    lines = _plain(_on_a_terminal(cli, "network list"))
    assert max(map(len, lines)) <= 80
    assert _LONG[:13] in lines[2]
    assert "serving" in lines[2]
    assert ("SOURCE" in lines[0]) is spare


def test_a_posted_password_cannot_steer_a_terminal(cli: Cli) -> None:
    cli("instance", "add", "web")
    cli.server.passwords.keep(InstanceId("web"), b"abc\x1b]0;owned\x07")
    assert _on_a_terminal(cli, "instance password web") == ["abc\\x1b]0;owned\\x07"]


def _clients(*paths: str) -> tuple[ReaderWithoutToken, ...]:
    client = "Boto3/1.34.0_md/Botocore#1.34.0_ua/2.0_os/linux#6.1.0"
    return tuple(ReaderWithoutToken(path, client, 3, 0, _AT) for path in paths)


_WEB = _clients("latest/user-data", "latest/meta-data")
_GUESTS = (
    GuestWithoutToken("blue", "web-1", 120, 0, _AT, _WEB),
    GuestWithoutToken(_LONG, "i-" + "9" * 62, 0, 123_456, _AT, _clients("latest/meta-data/x")),
    GuestWithoutToken("red", "db", 20, 0, _AT, ()),
)


@pytest.mark.parametrize(("command", "columns"), [("token report", 80), ("tokens report", 160)])
def test_the_token_report_fits_a_terminal(cli: Cli, command: str, columns: int) -> None:
    cli.server.token_report = TokenReport(_AT, _GUESTS, (), 0, one_in=20)
    lines = _plain(_on_a_terminal(cli, command, columns))
    assert max(map(len, lines)) <= columns
    words = " ".join(" ".join(lines).split())
    for text in (
        "web-1 ~120 0 /latest/",
        "0 123456 /latest/",
        "red db ~20 0 - -",
        "one read in 20 is counted",
    ):
        assert text in words
    assert (_LONG in words) is (columns > 80)


@pytest.mark.parametrize(
    ("one_in", "text"),
    [
        (20, "no read without a token was seen"),
        (1, "no read without a token was seen"),
        (0, "only refused reads are counted"),
    ],
)
def test_an_empty_token_report_shows_since_when_and_what_is_counted(
    cli: Cli, one_in: int, text: str
) -> None:
    cli.server.token_report = TokenReport(_AT, (), (), 0, one_in)
    words = cli("token", "report").words
    assert re.search(r"since 2026-11-18 \d\d:\d\d:40", words)
    assert text in words
    assert ("one read in 20" in words) is (one_in == 20)


def test_the_token_report_counts_the_open_trees_that_it_does_not_show(cli: Cli) -> None:
    tree = OpenTree(NetworkId("red"), InstanceId("web"), "/nocloud")
    cli.server.token_report = TokenReport(_AT, (), (tree,) * 7, 9)
    shown = cli("token", "report").out
    assert shown.count("warning: /nocloud gives instance web in red") == 5
    assert "warning: so do 4 more" in shown


def test_foreign_text_cannot_style_the_token_report_or_an_explanation(filled: Cli) -> None:
    reader = ReaderWithoutToken("latest", "\x1b]0;owned\x07[red]x[/red]", 3, 0, _AT)
    guest = GuestWithoutToken("blue", "web-1", 3, 0, _AT, (reader,))
    filled.server.token_report = TokenReport(_AT, (guest,), (), 0, one_in=1)
    assert "\\x1b]0;owned\\x07[red]x[/red]" in filled("token", "report").out
    filled("instance", "set", "web-1", "--name", "[red]w[/red]")
    assert "web-1 ([red]w[/red])" in filled("explain", "web-1").out
