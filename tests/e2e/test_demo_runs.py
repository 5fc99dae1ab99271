"""The demonstration's runs: nothing is left behind, however one ends."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.demonstration import HostView, demo_directory, start, wait_until

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(300)]

UP_S = 240.0


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with demo_directory() as made:
        yield made
        made.with_suffix(".json").unlink(missing_ok=True)


def test_once_leaves_nothing_behind(directory: Path) -> None:
    before = HostView.now(directory)
    demonstration = start(directory, "--once")
    output, _ = demonstration.process.communicate(timeout=UP_S)

    assert demonstration.process.returncode == 0, output
    assert "WRONG" not in output
    assert len(demonstration.told["guests"]) == 6
    assert HostView.now(directory) == before


@pytest.mark.parametrize("progress", ["imdsdemo-blue-b", "roots/red-b.ec2"])
def test_after_a_kill_half_way_a_rerun_leaves_nothing_behind(
    directory: Path, progress: str
) -> None:
    before = HostView.now(directory)
    shutil.rmtree(directory, ignore_errors=True)
    killed = start(directory)
    mark = directory / progress if "/" in progress else Path("/run/netns", progress)
    wait_until(progress, lambda: mark.exists() or killed.process.poll() is not None, UP_S)
    assert killed.process.poll() is None, killed.process.communicate()[0]
    killed.process.kill()
    killed.process.communicate()

    rerun = start(directory, "--once")
    output, _ = rerun.process.communicate(timeout=UP_S)

    assert rerun.process.returncode == 0, output
    assert "swept away" in output
    assert HostView.now(directory) == before


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
