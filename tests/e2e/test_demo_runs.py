"""The demonstration's runs: nothing is left behind, however one ends."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo.roster import guests
from support.demonstration import HostView, demo_directory, start, wait_until

pytestmark = [pytest.mark.root, pytest.mark.slow]

UP_S = 240.0


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with demo_directory() as made:
        yield made
        made.with_suffix(".json").unlink(missing_ok=True)


def test_once_fails_when_a_guest_sees_anything_but_its_own(directory: Path) -> None:
    before = HostView.now(directory)
    last = guests("any word")[-1]
    shutil.rmtree(directory, ignore_errors=True)
    demonstration = start(directory, "--once", "--dialect", "ec2")
    program = str(Path(sys.executable).parent / "imdsproxy")
    cli = [program, "--config", f"{directory}/imdsproxy.yaml"]
    change = [*cli, "instance", "set", last.uuid, "--hostname", "somebody-else.test"]
    wait_until(
        "the record of the last guest is changed under way",
        lambda: (
            subprocess.run(change, capture_output=True, check=False).returncode == 0
            or demonstration.process.poll() is not None
        ),
        UP_S,
    )

    output, _ = demonstration.process.communicate(timeout=UP_S)

    assert demonstration.process.returncode == 1, output
    assert f"{last.name}, ec2, IPV4: hostname is 'somebody-else.test'" in output
    assert "cloud-init set the hostname somebody-else" in output
    assert "Not every guest saw its own metadata." in output
    assert HostView.now(directory) == before


def test_after_kills_half_way_a_rerun_shows_everything_and_leaves_nothing_behind(
    directory: Path,
) -> None:
    before = HostView.now(directory)
    shutil.rmtree(directory, ignore_errors=True)
    killed_at(directory, "imdsdemo-blue-b")
    second = killed_at(directory, "roots/red-b.ec2")

    rerun = start(directory, "--once", "--dialect", "openstack")
    output, _ = rerun.process.communicate(timeout=UP_S)

    assert rerun.process.returncode == 0, output
    assert "WRONG" not in output
    assert len(rerun.told["guests"]) == 6
    assert "swept away" in second
    assert "swept away" in output
    assert HostView.now(directory) == before


def killed_at(directory: Path, progress: str) -> str:
    """What a run printed that was killed when it had made this namespace, or this file in its directory."""
    killed = start(directory)
    mark = directory / progress if "/" in progress else Path("/run/netns", progress)
    wait_until(progress, lambda: mark.exists() or killed.process.poll() is not None, UP_S)
    assert killed.process.poll() is None, killed.process.communicate()[0]
    killed.process.kill()
    return killed.process.communicate()[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_half_way_cleans_up(directory: Path, number: signal.Signals) -> None:
    before = HostView.now(directory)
    shutil.rmtree(directory, ignore_errors=True)
    demonstration = start(directory, "--once")
    wait_until(
        "the boots begin",
        lambda: (directory / "roots").exists() or demonstration.process.poll() is not None,
        UP_S,
    )

    status, output = demonstration.end(number)

    assert status == 128 + number, output
    assert not demonstration.json_file.exists()
    assert HostView.now(directory) == before
