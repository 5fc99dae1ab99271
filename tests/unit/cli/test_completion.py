"""What a shell is told, by a genuine bash and by what the scripts for zsh and fish would ask."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from imdsproxy.cli.main import main
from support.admin_server import AdminServer, admin_server

BIN = Path(sys.executable).parent


@pytest.fixture
def server(tmp_path: Path) -> Iterator[AdminServer]:
    with admin_server(tmp_path) as found:
        for arguments in (
            ("network", "add", "blue", "--namespace", "blue"),
            ("network", "add", "black", "--namespace", "black"),
            ("instance", "add", "web-1", "--network", "blue"),
            ("instance", "add", "web-2", "--network", "blue"),
            ("instance", "add", "mail", "--name", "post", "--network", "blue"),
        ):
            assert main(["--socket", str(found.socket), *arguments]) == 0
        yield found


def bash_completes(*words: str) -> list[str]:
    """What a genuine bash offers for the last word."""
    script = (
        'set -eu; eval "$(imdsproxy completion bash)"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); '
        'COMPREPLY=(); _imdsproxy_completion imdsproxy; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    ran = subprocess.run(
        ["/usr/bin/bash", "-c", script, "bash", "imdsproxy", *words],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": f"{BIN}:{os.defpath}"},
        timeout=30,
    )
    assert ran.stderr == ""
    return ran.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["inst"], ["instance"]),
        (["instance", "re"], ["remove", "reopen"]),
        (["instance", "add", "--from"], ["--from-libvirt"]),
        (["instance", ""], ["add", "set", "list", "show", "remove", "password", "reopen"]),
        (["token", "r"], ["revoke", "rotate", "report"]),
        (["instance", "nothing"], []),
    ],
)
def test_commands_and_options_are_completed(words: list[str], offered: list[str]) -> None:
    assert bash_completes(*words) == offered


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["network", "show", "b"], ["black", "blue"]),
        (["network", "remove", "blue", "bla"], ["black"]),
        (["instance", "show", "web-"], ["web-1", "web-2"]),
        (["instance", "set", "m"], ["mail"]),
        (["instance", "set", "po"], ["post"]),
        (["explain", "po"], ["post"]),
        (["instance", "list", "--network", "bl"], ["black", "blue"]),
        (["instance", "add", "x", "--network", "blu"], ["blue"]),
        (["snippet", "web-"], ["web-1", "web-2"]),
        (["token", "revoke", "web-"], ["web-1", "web-2"]),
        (["instance", "reopen", "m"], ["mail"]),
        (["explain", "--network", "bl"], ["black", "blue"]),
    ],
)
def test_names_that_the_daemon_knows_are_completed(
    server: AdminServer, words: list[str], offered: list[str]
) -> None:
    assert sorted(bash_completes("--socket", str(server.socket), *words)) == offered


def test_without_a_daemon_no_name_is_completed_and_nothing_is_said(tmp_path: Path) -> None:
    assert bash_completes("--socket", str(tmp_path / "nobody"), "network", "show", "b") == []


@pytest.mark.parametrize(
    ("shell", "asked"),
    [("zsh", {}), ("fish", {"_TYPER_COMPLETE_FISH_ACTION": "get-args"})],
)
def test_zsh_and_fish_are_told_what_they_ask_for(
    server: AdminServer, shell: str, asked: dict[str, str]
) -> None:
    line = f"imdsproxy --socket {server.socket} network show b"
    ran = subprocess.run(
        [BIN / "imdsproxy"],
        capture_output=True,
        text=True,
        check=True,
        env={"_IMDSPROXY_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_ARGS": line, **asked},
        timeout=30,
    )
    assert "blue" in ran.stdout
    assert "black" in ran.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert "_IMDSPROXY_COMPLETE=complete_" + shell in capsys.readouterr().out


def test_a_shell_without_a_script_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "tcsh"]) == 64
    assert "one of bash, zsh, fish" in capsys.readouterr().err
