"""The program on a terminal, completed by bash, without a daemon, how little it loads, and Neutron's files."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from jsonschema import Draft7Validator

from imdsproxy.cli.main import render_completion
from imdsproxy.config.load import load_settings
from imdsproxy.config.schema import Settings
from imdsproxy.config.strict_yaml import parse_yaml
from imdsproxy.controller.token_report import (
    GuestWithoutToken,
    OpenTree,
    ReaderWithoutToken,
    TokenReport,
)
from imdsproxy.model.entities import InstanceId, NetworkId
from imdsproxy.model.records.json_schema import schema_of_records
from support.cli import Cli, Ran, on_a_terminal, run_main
from support.demonstration import REPOSITORY
from support.umask import umask

_AT = 1_795_000_000.0
_LONG = "5f6a1d0e-7d0f-4a53-9d5f-0d4b5c1f7a10"


def _plain(lines: list[str]) -> list[str]:
    return [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines]


@pytest.mark.parametrize(
    ("environment", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
def test_colour_is_for_terminals_that_want_it(
    cli: Cli, environment: dict[str, str], *, coloured: bool
) -> None:
    written = "\n".join(on_a_terminal(cli, "status", environment=environment))
    assert "ready" in written
    assert ("\x1b[3" in written) is coloured


@pytest.mark.parametrize(("name", "spare"), [("short", True), ("n" * 60, False)])
def test_tables_fit_a_terminal_without_spare_columns_and_never_break_an_id(
    cli: Cli, name: str, *, spare: bool
) -> None:
    cli("network", "add", _LONG[:13], "--name", name, "--namespace", "qdhcp-blue")
    lines = _plain(on_a_terminal(cli, "network list"))
    assert max(map(len, lines)) <= 80
    assert _LONG[:13] in lines[2]
    assert "serving" in lines[2]
    assert ("SOURCE" in lines[0]) is spare


def test_a_posted_password_cannot_steer_a_terminal(cli: Cli) -> None:
    cli("instance", "add", "web")
    cli.server.passwords.keep(InstanceId("web"), b"abc\x1b]0;owned\x07")
    assert on_a_terminal(cli, "instance password web") == ["abc\\x1b]0;owned\\x07"]


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
    lines = _plain(on_a_terminal(cli, command, columns))
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
    assert "warning: 4 more such instances" in shown


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
        ("instance ", "add set list show remove password reopen move"),
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
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """Runs a command line, of words and further arguments, without settings in the environment."""
    for name in [name for name in os.environ if name.startswith("IMDSPROXY_")]:
        monkeypatch.delenv(name)
    return lambda line, *more: run_main(*line.split(), *map(str, more))


def test_the_sample_is_a_configuration_and_the_schema_json(
    tmp_path: Path, run: Callable[..., Ran]
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(run("config sample").out)
    for line in (f"config show --json --config {config}", "config sample --json"):
        assert Settings.model_validate_json(run(line).out) == Settings()
    schema = run("config schema").json
    Draft7Validator.check_schema(schema)
    sample = parse_yaml(run("config sample").out, "sample").value
    assert list(Draft7Validator(schema).iter_errors(sample)) == []
    wrong: tuple[dict[str, object], ...] = (
        {"haproxi": {}},
        {"haproxy": {"maxconn": -1}},
        {"log": {"level": "loud"}},
    )
    assert not any(map(Draft7Validator(schema).is_valid, wrong))
    assert run("config schema --records").json == schema_of_records()
    assert f"# {config}:" in run(f"config show --origin -c {config}").out


@pytest.mark.parametrize("command", ["config show", "status", "run", "documents"])
def test_a_broken_configuration_is_78_with_every_problem(
    tmp_path: Path, run: Callable[..., Ran], command: str
) -> None:
    config = tmp_path / "c.yaml"
    missing = run(f"--config {config} {command}")
    assert (missing.status, "cannot read" in missing.err) == (78, True)
    config.write_text("haproxy: {maxcon: 1}\nlog: {level: loud}\n")
    broken = run(f"{command} --config {config}")
    assert broken.status == 78
    assert f"{config}:1: haproxy.maxcon" in broken.err
    assert f"{config}:2: log.level" in broken.err


def test_the_socket_is_the_one_of_the_settings(tmp_path: Path, run: Callable[..., Ran]) -> None:
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
            "import imdsproxy.cli.main, imdsproxy.host.logs, imdsproxy.api.metrics, imdsproxy.documents.resolver_app",
            "fastapi starlette keystoneauth1 openstack rich",
        ),
        (
            "import imdsproxy.documents.server",
            "imdsproxy.model.records pydantic fastapi yaml pyroute2 sqlite3 prometheus_client",
        ),
        (
            "import imdsproxy.tools.namespace_proxy",
            "imdsproxy.config.neutron_ini imdsproxy.config.schema pydantic yaml asyncio",
        ),
        ("import imdsproxy.cli.doctor", "imdsproxy.documents.dialects imdsproxy.model.records"),
        ("import imdsproxy.cli.status", "imdsproxy.host.servers"),
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


_GOLDEN = REPOSITORY / "tests/golden/neutron"
_ML2 = ("neutron.conf", "metadata_agent.ini", "l3_agent.ini", "dhcp_agent.ini", "nova.conf")
_OVN = ("neutron_ovn_metadata_agent.ini",)
_INI = "[DEFAULT]\nnova_metadata_host = nova\nmetadata_proxy_shared_secret = hush\n"


@pytest.fixture
def ini(tmp_path: Path) -> Path:
    path = tmp_path / "metadata_agent.ini"
    path.write_text(_INI)
    return path


def _mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


@pytest.mark.parametrize(("name", "files"), [("ml2", _ML2), ("ovn", _OVN)])
def test_the_files_of_a_real_host_come_out_as_expected_and_no_secret_is_shown(
    name: str, files: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, run: Callable[..., Ran]
) -> None:
    monkeypatch.chdir(_GOLDEN)
    ran = run("config import --neutron", *files)
    expected = ((_GOLDEN / f"{name}.{kind}").read_text() for kind in ("yaml", "txt"))
    assert ran == Ran(0, *expected)
    settings = load_settings(_GOLDEN / f"{name}.yaml", {}).settings
    assert settings.unix_listener.enabled
    assert set(settings.nova.endpoint_sets) == {"default"}
    shown = run("config import --neutron", "--json", *files).out + ran.out + ran.err
    for secret in ("Zei9", "iePhoh4", "notthesecret", "nova's password"):
        assert secret not in shown


def test_settings_and_secret_are_written_for_their_readers_only(
    ini: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    output = tmp_path / "etc" / "imdsproxy.yaml"
    assert run("config import --neutron", ini, "--output", output).status == 71, (
        "there is no such directory"
    )
    output.parent.mkdir()
    with umask(0):
        ran = run("config import --neutron", ini, "--output", output)
    secret = output.parent / "nova.secret"
    assert (ran.status, ran.err) == (0, "")
    assert (_mode(output), _mode(secret)) == (0o640, 0o600)
    assert secret.read_text() == "hush"
    settings = load_settings(output, {}).settings
    assert settings.nova.endpoint_sets["default"].secret_file == secret
    assert f"written: {output}" in ran.out
    assert "hush" not in ran.out + output.read_text()
    assert {path.name for path in output.parent.iterdir()} == {"imdsproxy.yaml", "nova.secret"}


def test_nothing_that_is_there_is_replaced_unasked(
    ini: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    output, secret = tmp_path / "c.yaml", tmp_path / "nova.secret"
    secret.write_text("another")
    command = ("config import --neutron", ini, "-o", output)
    refused = run(*command)
    assert (refused.status, "nova.secret would be replaced" in refused.err) == (73, True)
    assert (secret.read_text(), output.exists()) == ("another", False)
    assert run(*command, "--force").status == 0
    assert (secret.read_text(), _mode(secret)) == ("hush", 0o600)
    assert run(*command).status == 0, "the same once more is no change"
    assert run(*command, "--agent-user", "stack").status == 73
    assert "user: neutron" in output.read_text()


def test_a_secret_file_can_be_written_alone_and_is_an_instruction_otherwise(
    ini: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    at = f"put the value of metadata_proxy_shared_secret ({ini}:3)"
    assert f"/etc/imdsproxy/nova.secret: {at}" in run("config import --neutron", ini).err
    secret = tmp_path / "s"
    ran = run("config import --neutron", ini, "--secret-file", secret)
    assert ran.status == 0
    assert f"secret_file: {secret}" in ran.out
    assert f"written: {secret}" in ran.err
    assert secret.read_text() == "hush"


def test_json_has_each_option_with_what_becomes_of_it(ini: Path, run: Callable[..., Ran]) -> None:
    ini.write_text(f"{_INI}metadata_workers = 2\nother = 1\n")
    shape = run("config import --neutron", ini, "--json").json
    assert shape["settings"]["unix_listener"]["enabled"] is True
    assert (shape["written"], shape["others"]) == ([], 1)
    fates = {one["option"]: (one["fate"], one["line"], one["setting"]) for one in shape["options"]}
    assert fates["metadata_workers"] == ("no equivalent", 4, None)
    secret_file = "nova.endpoint_sets.default.secret_file"
    assert fates["metadata_proxy_shared_secret"] == ("taken over", 3, secret_file)
    assert shape["yaml"].startswith("# Made by")


def test_nonsense_is_78_with_file_and_line(
    ini: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    other, output = tmp_path / "b.ini", tmp_path / "c.yaml"
    other.write_bytes(b"[DEFAULT]\n\xff\n")
    ini.write_text("[DEFAULT]\nnonsense\n")
    ran = run("config import --neutron", ini, other, tmp_path / "none.ini", "-o", output)
    assert ran.status == 78
    for problem in (f"{ini}:2", f"{other}:2 is not UTF-8", "none.ini: No such file"):
        assert problem in ran.err
    ini.write_text(f"{_INI}nova_metadata_port = 70000\n")
    assert (
        f"{ini}:4: [DEFAULT] nova_metadata_port"
        in run("config import --neutron", ini, "-o", output).err
    )
    assert not output.exists()
