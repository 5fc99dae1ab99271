"""The doctor on genuine guests of a genuine daemon, and in their place: it finds nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from imdsproxy.cli.doctor import parse_url
from imdsproxy.core.doctor import Surroundings
from imdsproxy.core.doctor.checks_documents import examine
from imdsproxy.core.doctor.crawl import Crawl, crawl
from imdsproxy.core.model import Dialect
from support.daemon import instance
from support.guest import IPV4, IPV6, Guest, inside
from support.lab import until
from support.world import World

_QEMU: Final = "/usr/bin/qemu-system-x86_64"

pytestmark = pytest.mark.root

_URL = f"http://{IPV4}"
_PROGRAM = (sys.executable, "-m", "imdsproxy")
_EVERYTHING = {
    "ssh_keys": ["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGnJ a=b/c", "ssh-ed25519 AAAA second"],
    "tags": {"role": "web", "a key": "x"},
    "vendor_data": "#cloud-config\n{}\n",
    "availability_zone": "az-1a",
    "instance_type": "m1",
}


def _ask_all(guest: Guest, url: str) -> Crawl:
    def ask() -> Crawl:
        return crawl(parse_url(url), direct=True)

    return inside(guest.namespace, ask, directory=guest.directory)


def test_the_daemon_says_nothing_wrong_of_its_guests(world: World) -> None:
    for guest in world.everybody:
        ran = world.daemon.command(
            "doctor", "--network", guest.network, "--from", guest.addresses[0], "--json"
        )

        reported = json.loads(ran.out)
        assert ran.status == 0, reported
        assert [one["code"] for one in reported["findings"]] == ["gate"]
        assert set(reported["served"]) == set(Dialect)
        assert f"{guest.network}-5" in reported["subject"]


@pytest.mark.parametrize("fields", [{}, _EVERYTHING], ids=["plain", "everything"])
def test_a_guest_finds_nothing_either(world: World, fields: dict[str, object]) -> None:
    guest = world.red
    world.daemon.put([], [instance("red-5", "red", 5, fields=fields)])
    around = Surroundings(macs=frozenset({guest.mac}))

    for url in (_URL, f"http://[{IPV6}%25{guest.device}]"):
        done = _ask_all(guest, url)
        assert done.given_up == ""
        assert examine(done, around) == ()
        assert all(dialect in done.served for dialect in Dialect)


def test_a_wrong_mac_in_the_record_is_found_in_the_guest(world: World) -> None:
    wrong = instance("red-5", "red", 5, mac="fa:16:3e:ff:ff:ff")
    world.daemon.put([], [wrong])
    until(lambda: world.red.ask("/openstack").status == 403)
    ran = subprocess.run(
        ["/usr/sbin/ip", "netns", "exec", world.red.namespace, *_PROGRAM, "doctor", _URL, "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    codes = {one["code"] for one in json.loads(ran.stdout)["findings"]}
    assert ran.returncode == 1
    # Whether the machine of the tests looks like a cloud is its own business.
    assert codes - {"gate-shut"} == {"refused"}


_LACKED: Final = "fa:16:3e:77:00:02"


def _operators_doctor(world: World) -> tuple[int, dict[str, str]]:
    ran = world.daemon.command("doctor", "--network", "red", "--from", "10.0.0.5", "--json")
    found = json.loads(ran.out)["findings"]
    return ran.status, {one["code"]: one["what"] for one in found}


@contextmanager
def _machine(macs: Sequence[str]) -> Iterator[None]:
    """A virtual machine with these network cards, which does not run; its command line is all that is looked at."""
    cards = [word for mac in macs for word in ("-device", f"virtio-net-pci,mac={mac}")]
    command = [_QEMU, "-S", "-nodefaults", "-display", "none", "-accel", "tcg", "-m", "16", *cards]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        # Until it is executed, its command line is that of this process.
        shown = Path(f"/proc/{process.pid}/cmdline")
        until(lambda: b"qemu" in shown.read_bytes().partition(b"\0")[0])
        yield
    finally:
        process.kill()
        process.wait()


def test_the_operator_reads_that_a_virtual_machine_lacks_a_card_of_its_record(world: World) -> None:
    ports = [
        {"network": network, "mac": mac, "addresses": [address]}
        for network, mac, address in (
            ("red", world.red.mac, "10.0.0.5"),
            ("green", _LACKED, "10.0.0.77"),
        )
    ]
    world.daemon.put([], [instance("red-5", "red", fields={"ports": ports})])
    assert world.red.ask("/openstack").status == 200
    with _machine([world.red.mac]):
        status, found = _operators_doctor(world)
    assert (status, set(found)) == (1, {"gate", "mac-mismatch"})
    assert _LACKED in found["mac-mismatch"]
    with _machine([world.red.mac, _LACKED]):
        assert _operators_doctor(world) == (0, {"gate": found["gate"]})
