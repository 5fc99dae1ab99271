"""Commands that need no daemon, and the program as a process."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from imdsproxy import __version__, errors
from imdsproxy.cli.main import main
from imdsproxy.cli.options import EXIT_STATUSES
from imdsproxy.config.schema import Settings
from imdsproxy.errors import ImdsproxyError
from support.patience import patience

PROGRAM = [sys.executable, "-m", "imdsproxy"]


@pytest.fixture(autouse=True)
def _no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("IMDSPROXY_"):
            monkeypatch.delenv(name)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out == f"imdsproxy {__version__}\n"
    assert main(["version", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"version": __version__}


def test_the_sample_is_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "sample"]) == 0
    config = tmp_path / "c.yaml"
    config.write_text(capsys.readouterr().out)

    assert main(["config", "show", "--json", "--config", str(config)]) == 0
    assert Settings.model_validate_json(capsys.readouterr().out) == Settings()


def test_show_says_where_a_value_was_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("log: {level: debug}\n")
    monkeypatch.setenv("IMDSPROXY_LOG__FORMAT", "json")

    assert main(["config", "show", "--origin", "-c", str(config)]) == 0

    out = capsys.readouterr().out
    assert f"# {config}:1" in out
    assert "# IMDSPROXY_LOG__FORMAT" in out


def test_a_broken_configuration_is_78_with_every_problem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("haproxy: {maxcon: 1}\nlog: {level: loud}\n")

    for command in (["config", "show"], ["status"], ["run"], ["documents"]):
        assert main([*command, "--config", str(config)]) == 78
        err = capsys.readouterr().err
        assert f"{config}:1: haproxy.maxcon" in err
        assert f"{config}:2: log.level" in err


def test_a_configuration_that_is_not_there_is_78(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(tmp_path / "none.yaml"), "status"]) == 78
    assert "cannot read" in capsys.readouterr().err


def test_the_socket_is_the_one_of_the_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(f"paths: {{runtime_dir: {tmp_path}/there}}\n")

    assert main(["status", "-c", str(config)]) == 69
    assert f"{tmp_path}/there/admin.sock" in capsys.readouterr().err


def test_the_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema"]) == 0
    assert "haproxy" in json.loads(capsys.readouterr().out)["properties"]


def test_help_starts_fast_and_loads_no_more_than_it_needs() -> None:
    code = (
        "import sys\n"
        "from imdsproxy.cli.main import main\n"
        "main(['--help'])\n"
        "heavy = {'pydantic', 'fastapi', 'uvicorn', 'yaml', 'structlog', 'pyroute2', 'sqlite3',"
        " 'prometheus_client', 'asyncio'}\n"
        "sys.exit(', '.join(sorted(heavy & sys.modules.keys())) or 0)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert (ran.returncode, ran.stderr) == (0, "")
    assert "Usage" in ran.stdout
    assert min(_seconds([*PROGRAM, "--help"]) for _ in range(5)) < 0.4 * patience()


@pytest.mark.parametrize(
    ("module", "later"),
    [
        (
            "main",
            "fastapi starlette uvicorn prometheus_client httpcore keystoneauth1 openstack rich",
        ),
        ("http", "fastapi starlette keystoneauth1 openstack rich"),
    ],
)
def test_guests_are_served_before_a_daemon_loads_what_only_others_need(
    module: str, later: str
) -> None:
    code = (
        "import sys\n"
        f"import imdsproxy.cli.main, imdsproxy.host.plain_structlog, imdsproxy.controller.{module}\n"
        f"later = set('{later}'.split())\n"
        "early = ', '.join(sorted(later & sys.modules.keys()))\n"
        "import rich.table\n"
        "sys.exit(early or 0)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert (ran.returncode, ran.stderr) == (0, "")


def _seconds(argv: list[str]) -> float:
    """Processor time, which a busy machine does not stretch as it does the clock's."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(argv, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def test_a_reader_that_goes_away_is_no_error() -> None:
    with subprocess.Popen(
        [*PROGRAM, "config", "sample"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.wait(20) == 141
        assert process.stderr.read() == b""


def test_every_exit_status_of_an_error_is_documented() -> None:
    kinds = [getattr(errors, name) for name in errors.__all__]
    used = {
        kind.exit_status
        for kind in kinds
        if isinstance(kind, type) and issubclass(kind, ImdsproxyError)
    }

    assert used <= EXIT_STATUSES.keys()
