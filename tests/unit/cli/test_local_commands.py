"""Commands that need no daemon, and the program as a process."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from imdsproxy.config.schema import Settings
from support.cli import Ran, run_main
from support.patience import patience

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


def test_show_names_where_a_value_was_written(
    tmp_path: Path, run: Callable[[str], Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("log: {level: debug}\n")
    monkeypatch.setenv("IMDSPROXY_LOG__FORMAT", "json")
    shown = run(f"config show --origin -c {config}")
    assert shown.status == 0
    assert f"# {config}:1" in shown.out
    assert "# IMDSPROXY_LOG__FORMAT" in shown.out


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


def test_help_starts_fast() -> None:
    assert min(_seconds([*PROGRAM, "--help"]) for _ in range(5)) < 0.4 * patience()


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
