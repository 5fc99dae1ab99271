"""The program as a process: on a terminal, completed by bash, without a daemon, and how little it loads."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from imdsproxy.cli.main import render_completion
from imdsproxy.config.schema import Settings
from imdsproxy.core.model import InstanceId, NetworkId
from imdsproxy.core.token_report import GuestWithoutToken, OpenTree, ReaderWithoutToken, TokenReport
from support.cli import Cli, Ran, run_main

_AT = 1_795_000_000.0
_LONG = "5f6a1d0e-7d0f-4a53-9d5f-0d4b5c1f7a10"


def _on_a_terminal(
    cli: Cli, command: str, columns: int = 80, environment: Mapping[str, str] | None = None
) -> list[str]:
    """The lines that a command writes to a terminal."""
    program = shlex.join([sys.executable, "-m", "imdsproxy", "--socket", str(cli.server.socket)])
    ran = subprocess.run(
        [
            "/usr/bin/script",
            "-qec",
            f"stty cols {columns} rows 24; {program} {command}",
            "/dev/null",
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env={"PATH": os.environ["PATH"], "TERM": "xterm-256color", **(environment or {})},
        check=False,
        timeout=30,
    )
    return ran.stdout.decode().splitlines()


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


def test_an_empty_token_report_shows_since_when_and_what_is_counted(cli: Cli) -> None:
    for one_in, text in (
        (20, "one read in 20 is counted"),
        (1, "no read without a token was seen"),
        (0, "only refused reads are counted"),
    ):
        cli.server.token_report = TokenReport(_AT, (), (), 0, one_in)
        words = cli("token", "report").words
        assert re.search(r"since 2026-11-18 \d\d:\d\d:40", words)
        assert text in words
        assert ("one read in" in text) is ("one read in" in words)


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


def test_names_that_the_daemon_knows_are_completed(known: Cli, tmp_path: Path) -> None:
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
    settings = tmp_path / "imdsproxy.yaml"
    settings.write_text(f"admin: {{socket: {known.server.socket}}}")
    assert bash_completes("network show bla", "--config", str(settings)) == ["black"]


def test_without_a_daemon_no_name_is_completed_and_nothing_is_printed(tmp_path: Path) -> None:
    assert bash_completes("network show b", "--socket", str(tmp_path / "none")) == []


def test_each_shell_has_a_script_and_others_are_refused(cli: Cli) -> None:
    for shell in ("bash", "zsh", "fish"):
        assert f"_IMDSPROXY_COMPLETE=complete_{shell}" in cli("completion", shell).out
    refused = cli("completion", "tcsh")
    assert (refused.status, "one of bash, zsh, fish" in refused.err) == (64, True)


PROGRAM = [sys.executable, "-m", "imdsproxy"]


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], Ran]:
    """Runs a command line without settings in the environment."""
    for name in [name for name in os.environ if name.startswith("IMDSPROXY_")]:
        monkeypatch.delenv(name)
    return lambda line: run_main(capsys, *line.split())


def test_the_sample_is_a_configuration_and_the_schema_json(
    tmp_path: Path, run: Callable[[str], Ran]
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(run("config sample").out)
    for line in (f"config show --json --config {config}", "config sample --json"):
        assert Settings.model_validate_json(run(line).out) == Settings()
    assert "haproxy" in run("config schema").json["properties"]
    assert f"# {config}:" in run(f"config show --origin -c {config}").out


@pytest.mark.parametrize("command", ["config show", "status", "run", "documents"])
def test_a_broken_configuration_is_78_with_every_problem(
    tmp_path: Path, run: Callable[[str], Ran], command: str
) -> None:
    config = tmp_path / "c.yaml"
    missing = run(f"--config {config} {command}")
    assert (missing.status, "cannot read" in missing.err) == (78, True)
    config.write_text("haproxy: {maxcon: 1}\nlog: {level: loud}\n")
    broken = run(f"{command} --config {config}")
    assert broken.status == 78
    assert f"{config}:1: haproxy.maxcon" in broken.err
    assert f"{config}:2: log.level" in broken.err


def test_the_socket_is_the_one_of_the_settings(tmp_path: Path, run: Callable[[str], Ran]) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(f"paths: {{runtime_dir: {tmp_path}/there}}\n")
    asked = run(f"status -c {config}")
    assert (asked.status, f"{tmp_path}/there/admin.sock" in asked.err) == (69, True)


@pytest.mark.parametrize(
    ("statements", "later"),
    [
        (
            "from imdsproxy.cli.main import main; main(['--help'])",
            "pydantic fastapi uvicorn yaml structlog pyroute2 sqlite3 prometheus_client asyncio",
        ),
        (
            "from imdsproxy.cli.main import main; main(['-c', 'status', '--json', 'version'])",
            "imdsproxy.cli.records imdsproxy.cli.status imdsproxy.config rich",
        ),
        (
            "import imdsproxy.cli.main, imdsproxy.host.logs, imdsproxy.start",
            "fastapi starlette uvicorn prometheus_client httpcore keystoneauth1 openstack rich",
        ),
        (
            "import imdsproxy.cli.main, imdsproxy.host.logs, imdsproxy.admin.metrics, imdsproxy.serving.resolver_app",
            "fastapi starlette keystoneauth1 openstack rich",
        ),
        (
            "import imdsproxy.serving.server",
            "imdsproxy.core.records pydantic fastapi yaml pyroute2 sqlite3 prometheus_client",
        ),
    ],
)
def test_help_and_a_daemon_before_it_serves_load_no_more_than_they_need(
    statements: str, later: str
) -> None:
    code = (
        f"import sys\n{statements}\n"
        f"early = sorted(set('{later}'.split()) & sys.modules.keys())\n"
        "import rich.table\n"
        "sys.exit(', '.join(early) or 0)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ("Usage" in ran.stdout) is ("--help" in statements)


def test_a_reader_that_goes_away_is_no_error() -> None:
    with subprocess.Popen(
        [*PROGRAM, "config", "sample"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.wait(20) == 141
        assert process.stderr.read() == b""
