"""The wheel works where there is no repository: with the pinned libraries, from any directory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from support.demonstration import REPOSITORY
from support.lab import until
from support.packages import Packages, build_packages, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

_SETTINGS: Final = """
paths: {{runtime_dir: {run}, state_dir: {state}}}
metrics: {{listen: null, haproxy_listen: null}}
haproxy: {{supervisor: spawn}}
documents: {{supervisor: spawn}}
"""


@pytest.fixture(scope="module")
def packages() -> Packages:
    return build_packages()


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that the workers of HAProxy and of the document server, who are other users, can enter."""
    directory = Path(tempfile.mkdtemp(prefix="imdst-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def environment(packages: Packages) -> Iterator[Path]:
    """A virtual environment made as docs/install.md says, of the wheel and the list of libraries alone."""
    directory = Path(tempfile.mkdtemp(prefix="imdst-wheel-"))
    directory.chmod(0o755)
    wheel, pinned = directory / packages.wheel.name, directory / "runtime.txt"
    shutil.copy(packages.wheel, wheel)
    shutil.copy(REPOSITORY / "requirements/runtime.txt", pinned)
    target = directory / "environment"
    run([sys.executable, "-m", "venv", str(target)], timeout_s=60)
    pip = [str(target / "bin/pip"), "--quiet", "install"]
    run([*pip, "--require-hashes", "--requirement", str(pinned)], timeout_s=300)
    run([*pip, "--no-deps", "--no-index", str(wheel)], timeout_s=60)
    yield target
    shutil.rmtree(directory)


def test_the_wheel_holds_the_program_and_what_a_host_needs_and_no_more(packages: Packages) -> None:
    with zipfile.ZipFile(packages.wheel) as wheel:
        names = wheel.namelist()
    data = f"{packages.wheel.name.removesuffix('-py3-none-any.whl')}.data/data/share/imdsproxy/"
    shipped = {name.removeprefix(data) for name in names if name.startswith(data)}
    assert {"install", "imdsproxy.yaml", "man/imdsproxy.1", "systemd/imdsproxy.service"} <= shipped
    assert {name.split("/")[0].split("-")[0] for name in names} == {"imdsproxy"}
    assert not [name for name in names if "tests" in name or name.endswith(".pyc")]


def test_version_and_sample_come_from_any_directory(environment: Path, tmp_path: Path) -> None:
    program = str(environment / "bin/imdsproxy")
    said = subprocess.run(
        [program, "version"], cwd=tmp_path, env={}, capture_output=True, text=True, check=True
    )
    assert said.stdout.startswith("imdsproxy ")
    where = [str(environment / "bin/python"), "-c", "import imdsproxy; print(imdsproxy.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, env={}, capture_output=True, text=True, check=True)
    assert found.stdout.startswith(f"{environment}/lib/")


@pytest.mark.root
def test_a_daemon_of_the_wheel_runs_and_ends(environment: Path, place: Path) -> None:
    settings = place / "settings.yaml"
    settings.write_text(_SETTINGS.format(run=place / "run", state=place / "state"))

    def command(*words: str) -> list[str]:
        return [str(environment / "bin/imdsproxy"), *words, "--config", str(settings)]

    def attempt(*words: str) -> int:
        clean = {"PATH": os.environ["PATH"]}
        return subprocess.run(command(*words), cwd="/", env=clean, check=False).returncode

    daemon = subprocess.Popen(command("run"), cwd="/", env={"PATH": os.environ["PATH"]})
    try:
        until(lambda: attempt("status", "--check") == 0, within_s=30, what="a daemon that is ready")
        assert attempt("check") == 0
        assert attempt("stop", "--data-plane") == 0
        assert daemon.wait(30) == 0
    finally:
        if daemon.poll() is None:
            attempt("stop", "--data-plane")
            daemon.kill()
            daemon.wait()


def test_its_installer_puts_units_pages_and_settings_in_place(
    environment: Path, tmp_path: Path
) -> None:
    run([str(environment / "share/imdsproxy/install"), str(tmp_path)], timeout_s=20)

    found = {str(one.relative_to(tmp_path)) for one in tmp_path.rglob("*") if one.is_file()}
    assert found >= {
        "etc/imdsproxy/imdsproxy.yaml",
        "etc/logrotate.d/imdsproxy",
        "usr/lib/systemd/system/imdsproxy.service",
        "usr/lib/systemd/system/imdsproxy-haproxy.service",
        "usr/lib/systemd/system/imdsproxy-documents.service",
        "usr/lib/sysusers.d/imdsproxy.conf",
        "usr/lib/tmpfiles.d/imdsproxy.conf",
        "usr/share/bash-completion/completions/imdsproxy",
        "usr/share/zsh/vendor-completions/_imdsproxy",
        "usr/share/fish/vendor_completions.d/imdsproxy.fish",
        "usr/share/man/man1/imdsproxy.1",
        "usr/share/man/man5/imdsproxy.yaml.5",
    }
