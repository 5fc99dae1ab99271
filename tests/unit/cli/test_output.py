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

from support.admin_server import admin_server


def _on_a_terminal(argv: list[str], environment: dict[str, str]) -> str:
    """What a program writes to a terminal of 80 columns."""
    controller, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
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

    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in written.splitlines()]
    assert max(len(line) for line in lines) <= 80
    assert network in written
    assert "serving" in written


def test_on_a_narrow_terminal_spare_columns_are_left_out(tmp_path: Path) -> None:
    with admin_server(tmp_path) as server:
        for name in ("short", "n" * 60):
            body = {"id": "blue", "name": name, "listener": {"namespace": "qdhcp-blue"}}
            server.client.request("PUT", "/v1/networks/blue", body=body)
            argv = [sys.executable, "-m", "imdsproxy", "--socket", str(server.socket)]
            written = _on_a_terminal([*argv, "network", "list"], {})
            assert ("SOURCE" in written) is (name == "short")
