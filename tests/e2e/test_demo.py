"""The demonstration shows what it says, and leaves nothing behind, however it ends."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from demo.roster import guests
from support.demonstration import REPOSITORY, Demonstration, host_view, start
from support.lab import until

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(600)]

_UP_S: Final = 240.0


@pytest.fixture
def directory() -> Iterator[Path]:
    """Where a demonstration may be, which HAProxy's account can reach; the machine is afterwards as it was before."""
    made = Path(f"/var/tmp/imdst-demo-{os.getpid()}")  # noqa: S108 - checked by the demo
    before = host_view(made)
    yield made
    after = host_view(made)
    made.with_suffix(".json").unlink(missing_ok=True)
    shutil.rmtree(made, ignore_errors=True)
    assert after == before


def _wait_for(demonstration: Demonstration, file: Path) -> None:
    process = demonstration.process
    until(lambda: file.exists() or process.poll() is not None, within_s=_UP_S, what=str(file))
    assert process.poll() is None, process.communicate()[0]


def test_after_kills_half_way_it_comes_up_with_all_that_its_json_says_and_leaves_nothing_behind(
    directory: Path,
) -> None:
    _kill_at(directory, Path("/run/netns/imdsdemo-blue-b"))
    second = _kill_at(directory, directory / "roots/red-b.ec2")
    assert "swept away" in second

    demonstration = start(directory)
    try:
        _wait_for(demonstration, demonstration.json_file)
        found = demonstration.told
        listed = _run([*found["cli"], "instance", "list", "--json"])
        assert len(found["guests"]) == 6
        for guest in found["guests"]:
            url = "http://169.254.169.254/latest/meta-data/instance-id"
            assert _run([*guest["enter"], "curl", "-sSf", url]) == guest["instance_id"]
            assert guest["uuid"] in listed
        pids = [*found["haproxy"].values(), *found["documents"], found["controller"]]
        commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids]
        assert all(b"haproxy" in command for command in commands[:2])
        assert all(b"imdsproxy" in command for command in commands[2:])
        roots = list((directory / "roots").glob("*.*"))
        assert len(roots) == 18
        assert all((root / "proof" / "written").is_file() for root in roots)
        assert not any(list((root / "usr").iterdir()) for root in roots)
    finally:
        status, output = demonstration.end()
    assert status == 0, output
    assert "swept away" in output
    assert "Every guest saw its own metadata and nothing else." in output


def _kill_at(directory: Path, file: Path) -> str:
    """What a run printed that was killed when it had made this."""
    demonstration = start(directory)
    _wait_for(demonstration, file)
    demonstration.process.kill()
    return demonstration.process.communicate()[0]


def _run(words: list[str]) -> str:
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout


def test_once_fails_when_a_guest_sees_anything_but_its_own(directory: Path) -> None:
    last = guests("any word")[-1]
    demonstration = start(directory, "--once", "--dialect", "ec2")
    program = str(Path(sys.executable).parent / "imdsproxy")
    cli = [program, "--config", f"{directory}/imdsproxy.yaml"]
    change = [*cli, "instance", "set", last.uuid, "--hostname", "somebody-else.test"]
    until(
        lambda: (
            subprocess.run(change, capture_output=True, check=False).returncode == 0
            or demonstration.process.poll() is not None
        ),
        within_s=_UP_S,
        what="the change of the last guest's record under way",
    )

    output, _ = demonstration.process.communicate(timeout=_UP_S)

    assert demonstration.process.returncode == 1, output
    assert f"{last.name}, ec2, IPV4: hostname is 'somebody-else.test'" in output
    assert "cloud-init set the hostname somebody-else" in output
    assert "Not every guest saw its own metadata." in output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_half_way_cleans_up(directory: Path, number: signal.Signals) -> None:
    demonstration = start(directory, "--once")
    _wait_for(demonstration, directory / "roots")

    status, output = demonstration.end(number)

    assert status == 128 + number, output
    assert not demonstration.json_file.exists()


@pytest.mark.always
def test_a_fleet_whose_parts_are_killed_shows_that_each_guest_read_its_own_always() -> None:
    ran = subprocess.run(
        (REPOSITORY / "script/demo", "--fleet"),
        capture_output=True,
        text=True,
        timeout=_UP_S,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "a → b" in ran.stdout
    assert "mail → mail-2 → mail-3" in ran.stdout
    assert ran.stdout.endswith("Every guest read its own, always.\n")
