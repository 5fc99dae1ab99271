"""The demonstration while it is up: real clients play with it, a program reads its JSON file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.demonstration import Demonstration, HostView, demo_directory, start, wait_until

pytestmark = [pytest.mark.root, pytest.mark.slow]

UP_S = 240.0
BOTOCORE = """
import json
from botocore.utils import IMDSFetcher, InstanceMetadataFetcher, InstanceMetadataRegionFetcher
fetcher = IMDSFetcher(timeout=5)
token = fetcher._fetch_metadata_token()
get = lambda path: fetcher._get_request(path, None, token).text
print(json.dumps({
    "instance_id": get("/latest/meta-data/instance-id"),
    "hostname": get("/latest/meta-data/hostname"),
    "region": InstanceMetadataRegionFetcher(timeout=5).retrieve_region(),
    "credentials": InstanceMetadataFetcher(timeout=5).retrieve_iam_role_credentials(),
}))
"""


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with demo_directory() as made:
        yield made
        made.with_suffix(".json").unlink(missing_ok=True)


@pytest.fixture(scope="module")
def up(directory: Path) -> Iterator[Demonstration]:
    """One demonstration that stays up for all tests that play with it."""
    before = HostView.now(directory)
    demonstration = start(directory)
    try:
        wait_until(
            "the demonstration is up",
            lambda: demonstration.json_file.exists() or demonstration.process.poll() is not None,
            UP_S,
        )
        assert demonstration.process.poll() is None, demonstration.process.communicate()[0]
        yield demonstration
        status, output = demonstration.end()
        assert status == 0, output
        assert "Every guest saw its own metadata and nothing else." in output
        assert HostView.now(directory) == before
    finally:
        if demonstration.process.poll() is None:
            demonstration.end(signal.SIGTERM)


def as_guest(guest: dict[str, Any], *argv: str) -> bytes:
    done = subprocess.run([*guest["enter"], *argv], capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def curl(guest: dict[str, Any], path: str, host: str = "169.254.169.254") -> str:
    argv = ("curl", "-sS", "-f", "-g", "--max-time", "20", f"http://{host}/{path}")
    return as_guest(guest, *argv).decode()


def test_every_guest_is_known_by_each_of_its_addresses(up: Demonstration) -> None:
    for guest in up.told["guests"]:
        for address in guest["addresses"]:
            host = "[fe80::a9fe:a9fe%25eth0]" if ":" in address else "169.254.169.254"
            argv = ("curl", "-sS", "-f", "-g", "--max-time", "20", "--interface", f"host!{address}")
            url = f"http://{host}/latest/meta-data/instance-id"
            assert as_guest(guest, *argv, url).decode() == guest["instance_id"]


def test_a_guest_is_known_by_its_link_local_address(up: Demonstration) -> None:
    for guest in up.told["guests"]:
        meta = json.loads(
            curl(guest, "openstack/latest/meta_data.json", "[fe80::a9fe:a9fe%25eth0]")
        )
        assert meta["uuid"] == guest["uuid"]
        assert meta["hostname"] == guest["hostname"]


def test_guests_with_equal_addresses_read_different_documents(up: Demonstration) -> None:
    by_address: dict[str, set[str]] = {}
    for guest in up.told["guests"]:
        seen = by_address.setdefault(guest["addresses"][0], set())
        seen.add(curl(guest, "latest/meta-data/instance-id"))

    assert [len(seen) for seen in by_address.values()] == [3, 3]


def test_botocore_finds_instance_and_region_and_no_credentials(up: Demonstration) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
    for guest in up.told["guests"][::2]:
        done = subprocess.run(
            [*guest["enter"], sys.executable, "-c", BOTOCORE],
            capture_output=True,
            timeout=60,
            check=False,
            env=environment,
        )
        assert done.returncode == 0, done.stderr.decode()
        assert json.loads(done.stdout) == {
            "instance_id": guest["instance_id"],
            "hostname": guest["hostname"],
            # botocore takes a region to be the zone without its last character
            "region": guest["availability_zone"][:-1],
            "credentials": {},
        }


def test_the_json_names_the_processes_that_run(up: Demonstration) -> None:
    told = up.told
    pids = [*told["haproxy"].values(), *told["documents"], told["controller"]]
    commands = [Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ") for pid in pids]

    assert all(b"haproxy" in command for command in commands[:2])
    assert all(b"imdsproxy" in command for command in commands[2:])
    assert len(set(pids)) == len(pids)
    assert len(told["documents"]) >= 2


def test_the_json_has_a_command_line_that_talks_to_the_daemon(up: Demonstration) -> None:
    told = up.told
    done = subprocess.run(
        [*told["cli"], "instance", "list", "--json"], capture_output=True, timeout=60, check=True
    )

    for guest in told["guests"]:
        assert guest["uuid"] in done.stdout.decode()


def test_the_last_cloud_init_boot_left_the_host_alone(up: Demonstration) -> None:
    assert up.process.poll() is None
    roots = list((up.directory / "roots").glob("*.*"))

    assert len(roots) == 18
    for root in roots:
        assert (root / "proof" / "written").is_file()
        assert not list((root / "usr").iterdir()), "the overlay ended with its namespace"
