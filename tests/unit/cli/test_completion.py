"""What a genuine bash is offered; how zsh and fish ask is typer's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from imdsproxy.cli.main import render_completion
from imdsproxy.cli.options import complete_networks
from support.cli import Cli

BIN = Path(sys.executable).parent


@pytest.fixture
def known(filled: Cli) -> Cli:
    filled("network", "add", "black", "--namespace", "black")
    filled("instance", "add", "web-2", "--network", "blue")
    assert filled("instance", "add", "mail", "--name", "post", "--network", "blue").status == 0
    return filled


def bash_completes(words: str, *before: str) -> list[str]:
    """What a genuine bash offers for the last word."""
    script = (
        'set -eu; eval "$SCRIPT"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); '
        'COMPREPLY=(); _imdsproxy_completion imdsproxy; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    ran = subprocess.run(
        ["/usr/bin/bash", "-c", script, "bash", "imdsproxy", *before, *words.split(" ")],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": f"{BIN}:{os.defpath}", "SCRIPT": render_completion("bash")},
        timeout=30,
    )
    assert ran.stderr == ""
    return ran.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("inst", "instance"),
        ("instance re", "remove reopen"),
        ("instance add --from", "--from-libvirt"),
        ("instance ", "add set list show remove password reopen"),
        ("token r", "revoke rotate report"),
        ("instance nothing", ""),
    ],
)
def test_commands_and_options_are_completed(words: str, offered: str) -> None:
    assert bash_completes(words) == offered.split()


def test_names_that_the_daemon_knows_are_completed(known: Cli) -> None:
    for words, offered in {
        "network show b": "black blue",
        "network remove blue bla": "black",
        "instance set po": "post",
        "explain po": "post",
        "instance list --network bl": "black blue",
        "instance add x --network blu": "blue",
        "snippet web-": "web-1 web-2",
        "token revoke web-": "web-1 web-2",
    }.items():
        found = bash_completes(words, "--socket", str(known.server.socket))
        assert sorted(found) == offered.split(), words


@pytest.mark.parametrize("kind", [str, Path])
def test_names_come_from_the_daemon_of_the_settings_that_are_named(
    known: Cli, tmp_path: Path, kind: type[str | Path]
) -> None:
    settings = tmp_path / "imdsproxy.yaml"
    settings.write_text(f"admin: {{socket: {known.server.socket}}}")
    # Options before the command are in the outer context; typer 0.15 has texts there, later ones paths.
    root = SimpleNamespace(params={"socket": None, "config": kind(settings)}, parent=None)
    context: Any = SimpleNamespace(params={"config": None}, parent=root)
    assert complete_networks(context, "bla") == ["black"]


def test_without_a_daemon_no_name_is_completed_and_nothing_is_printed(tmp_path: Path) -> None:
    assert bash_completes("network show b", "--socket", str(tmp_path / "none")) == []


def test_each_shell_has_a_script_and_others_are_refused(cli: Cli) -> None:
    for shell in ("bash", "zsh", "fish"):
        assert f"_IMDSPROXY_COMPLETE=complete_{shell}" in cli("completion", shell).out
    refused = cli("completion", "tcsh")
    assert (refused.status, "one of bash, zsh, fish" in refused.err) == (64, True)
