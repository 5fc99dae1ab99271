"""The wheel works where there is no repository: with the pinned libraries, from any directory, on an old Python."""

import contextlib
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.daemon import Daemon
from support.demonstration import REPOSITORY
from support.lab import Lab, run, until, within
from support.packages import Packages, build_packages

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def packages() -> Packages:
    return build_packages()


@pytest.fixture(scope="module")
def environment(packages: Packages) -> Iterator[Path]:
    """A virtual environment made as docs/how-to/install.md says, of the wheel and the list of libraries alone.

    It has the oldest Python that imdsproxy takes, where this machine has one: all other tests run on a newer one.
    """
    directory = Path(tempfile.mkdtemp(prefix="imdst-wheel-"))
    directory.chmod(0o755)
    wheel, pinned = directory / packages.wheel.name, directory / "runtime.txt"
    shutil.copy(packages.wheel, wheel)
    shutil.copy(REPOSITORY / "requirements/runtime.txt", pinned)
    target = directory / "environment"
    run(shutil.which("python3.11") or sys.executable, "-m", "venv", str(target))
    # Python compiles what it imports, which is a small part.
    pip = (str(target / "bin/pip"), "--quiet", "install", "--no-compile")
    run(*pip, "--require-hashes", "--requirement", str(pinned), timeout_s=300)
    run(*pip, "--no-deps", "--no-index", str(wheel))
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


@pytest.mark.root
def test_a_daemon_of_the_wheel_runs_anywhere_and_ends(environment: Path, tmp_path: Path) -> None:
    program = str(environment / "bin/imdsproxy")
    found = run(program, "version", cwd=tmp_path)
    assert found.startswith("imdsproxy ")
    where = "import imdsproxy; print(imdsproxy.__file__)"
    found = run(str(environment / "bin/python"), "-c", where, cwd=tmp_path)
    assert found.startswith(f"{environment}/lib/")
    with contextlib.ExitStack() as stack:
        lab = Lab()
        stack.callback(lab.close)
        daemon = Daemon(lab, program=(program,))
        stack.callback(daemon.close)
        daemon.start()
        for words in (("check",), ("stop", "--data-plane")):
            run(*within(lab.host), program, "--config", str(daemon.config), *words)
        until(lambda: not daemon.processes(), within_s=30, what="the end of all processes")


def test_its_installer_puts_units_pages_and_settings_in_place(
    environment: Path, tmp_path: Path
) -> None:
    run(str(environment / "share/imdsproxy/install"), str(tmp_path))

    found = {str(one.relative_to(tmp_path)) for one in tmp_path.rglob("*") if one.is_file()}
    assert found >= {
        "etc/imdsproxy/imdsproxy.yaml",
        "etc/logrotate.d/imdsproxy",
        "usr/lib/systemd/system/imdsproxy.service",
        "usr/lib/systemd/system/imdsproxy-haproxy.service",
        "usr/lib/systemd/system/imdsproxy-hub.service",
        "usr/lib/systemd/system/imdsproxy-documents.service",
        "usr/lib/sysusers.d/imdsproxy.conf",
        "usr/lib/tmpfiles.d/imdsproxy.conf",
        "usr/share/bash-completion/completions/imdsproxy",
        "usr/share/zsh/vendor-completions/_imdsproxy",
        "usr/share/fish/vendor_completions.d/imdsproxy.fish",
        "usr/share/man/man1/imdsproxy.1",
        "usr/share/man/man5/imdsproxy.yaml.5",
        "usr/share/imdsproxy/schema/settings.json",
        "usr/share/imdsproxy/schema/records.json",
        "usr/share/imdsproxy/prometheus/imdsproxy.rules.yml",
        "usr/share/imdsproxy/prometheus/imdsproxy-tokens.rules.yml",
        "usr/share/imdsproxy/grafana/imdsproxy.json",
        "usr/share/imdsproxy/libvirt/qemu.d-hook",
    }
