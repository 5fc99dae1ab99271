"""The demonstration shows what it says, and leaves nothing behind, however it ends."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import pytest

from demo.roster import guests
from support.demonstration import REPOSITORY, Demonstration, host_view, start
from support.lab import NETNS, until
from support.reaper import processes_of

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(600)]

_UP_S: Final = 240.0
_PROVES: Final = (
    "all the while, a new token for each login N logins, 0 lost, 1 subject, longest N ms"
)


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


def test_guests_of_two_projects_prove_who_they_are_whatever_is_killed_or_moved() -> None:
    ran = subprocess.run(
        (REPOSITORY / "script/demo", "--identity"),
        capture_output=True,
        text=True,
        timeout=_UP_S,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    table = [" ".join(line.split()) for line in ran.stdout.partition(" verdict")[2].splitlines()]
    assert [re.sub(r"\d+ (?=logins|ms)", "N ", line) for line in table if line] == [
        "web of shop a openstack token issue, project shop a token of shop right",
        "a bao kv get, secret of shop shop-s3cret right",
        "a openstack token issue, project bank refused: HTTP 401 right",
        "a bao kv get, secret of bank refused: Code: 403 right",
        "b openstack token issue, project shop a token of shop right",
        f"a → b {_PROVES} right",
        "db of bank a openstack token issue, project bank a token of bank right",
        "a bao kv get, secret of bank bank-s3cret right",
        "a openstack token issue, project shop refused: HTTP 401 right",
        "a bao kv get, secret of shop refused: Code: 403 right",
        f"a {_PROVES} right",
        "host a a requests a token of web, which is on a a token right",
        "a requests a token of web, which is on b refused: subject right",
        "Each guest proved who it is, and nobody else did.",
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_identity_demonstration_with_all_that_it_made(
    number: signal.Signals,
) -> None:
    place = Path(f"/var/tmp/imdst-{os.getpid()}")  # noqa: S108 - the test's own, and removed
    place.mkdir(mode=0o755)
    process = subprocess.Popen(
        (REPOSITORY / "script/demo", "--identity"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "TMPDIR": str(place)},
    )
    try:
        assert process.stdout is not None
        assert any("tries the other" in line for line in process.stdout)
        made = _namespaces_of(pid for pid, _ in processes_of([place]))
        assert len(made) > 10
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 128 + number, output
        until(
            lambda: not any(place.iterdir()) and not list(processes_of([place])),
            within_s=30,
            what="the end of files and processes",
        )
        assert not made & set(NETNS.iterdir())
    finally:
        process.kill()
        shutil.rmtree(place, ignore_errors=True)


def _namespaces_of(pids: Iterable[int]) -> set[Path]:
    """Return all network namespaces of the labs that these processes are in."""
    inodes = {Path(f"/proc/{pid}/ns/net").stat().st_ino for pid in pids}
    labs = {path.name[:10] for path in NETNS.iterdir() if path.stat().st_ino in inodes}
    return {path for path in NETNS.iterdir() if path.name[:10] in labs}
