"""The doctor on genuine guests of a genuine daemon, and in their place: it finds nothing."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from imdsproxy.cli.doctor_fetch import parse_url
from imdsproxy.core.doctor import Crawl, Surroundings, crawl, examine, run_crawl
from imdsproxy.core.model import Dialect
from support.daemon import instance
from support.guest import IPV4, IPV6, Guest, inside
from support.lab import until
from support.world import World

pytestmark = pytest.mark.root

_URL = f"http://{IPV4}"
_PROGRAM = (sys.executable, "-m", "imdsproxy")
_EVERYTHING = {
    "ssh_keys": ["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGnJ a=b/c", "ssh-ed25519 AAAA second"],
    "tags": {"role": "web", "a key": "x"},
    "vendor_data": "#cloud-config\n{}\n",
    "availability_zone": "az1",
    "instance_type": "m1",
}


def _ask_all(guest: Guest, url: str) -> Crawl:
    def ask() -> Crawl:
        return run_crawl(crawl(direct=True), parse_url(url))

    return inside(guest.namespace, ask, directory=guest.directory)


def test_the_daemon_says_nothing_wrong_of_its_guests(world: World) -> None:
    for guest in world.everybody:
        ran = world.daemon.command(
            "doctor", "--network", guest.network, "--from", guest.addresses[0], "--json"
        )

        told = json.loads(ran.out)
        assert ran.status == 0, told
        assert [one["code"] for one in told["findings"]] == ["gate"]
        assert set(told["served"]) == set(Dialect)
        assert f"{guest.network}-5" in told["subject"]


@pytest.mark.parametrize("fields", [{}, _EVERYTHING], ids=["plain", "everything"])
def test_a_guest_finds_nothing_either(world: World, fields: dict[str, object]) -> None:
    guest = world.red
    world.daemon.put([], [instance("red-5", "red", 5, fields=fields)])
    around = Surroundings(macs=frozenset({guest.mac}))

    for url in (_URL, f"http://[{IPV6}%25{guest.device}]"):
        done = _ask_all(guest, url)
        assert done.given_up == ""
        assert examine(done, around) == ()
        assert all(done.serves(dialect) for dialect in Dialect)


@pytest.mark.parametrize(
    ("mac_check", "found"), [(True, "refused"), (False, "mac-mismatch")], ids=str
)
def test_a_wrong_mac_in_the_record_is_found_in_the_guest(
    world: World, *, mac_check: bool, found: str
) -> None:
    (network,) = (one for one in world.networks if one["id"] == "red")
    wrong = instance("red-5", "red", 5, mac="fa:16:3e:ff:ff:ff")
    world.daemon.put([{**network, "mac_check": mac_check}], [wrong])
    until(lambda: world.red.ask("/openstack").status == (403 if mac_check else 200))

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
    assert codes - {"gate-shut"} == {found}


def test_a_stranger_is_told_that_nobody_knows_him(world: World) -> None:
    stranger = world.lab.guest("red", 66)

    codes = {one.code for one in examine(_ask_all(stranger, _URL), Surroundings())}

    # His questions are held for a while, because his record may be on its way.
    assert "nothing-served" in codes
    assert codes <= {"nothing-served", "slow"}, codes
