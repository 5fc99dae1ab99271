"""Stock virtual machines boot with nothing but what `imdsproxy snippet` prints, and each comes up as itself.

Two at once: `alice` on a NAT network as libvirt makes it, and `bob` on an isolated bridge at the same address. Of both
the records have only the MAC.
"""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest

from support.daemon import Daemon
from support.demonstration import REPOSITORY
from support.lab import Lab
from support.vm.machine import VirtualMachine, vm_image
from support.vm.networks import VmHost

# Emulated, and the image is made by the first run of the month.
pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(900)]

_LOGS: Final = REPOSITORY / ".cache" / "vm-logs"
_ADDRESS: Final = "192.168.122.50"
_SUBNET: Final = "192.168.122.0/24"
_NOT_IN_FORCE_YET: Final = 75
_KEY: Final = (
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl imdst"
)
_PLACES: Final = {
    "alice": ("nat", "virbr0", "52:54:00:aa:00:01"),
    "bob": ("isolated", "iso0", "52:54:00:bb:00:02"),
}
"""The network, its bridge, and the MAC of each machine."""

_USER_DATA: Final = """#!/bin/sh
echo "written for {name}" >/srv/proof
{{
    echo "hostname=$(hostname)"
    echo "proof=$(cat /srv/proof)"
    echo "keys=$(cat /home/debian/.ssh/authorized_keys)"
    echo "addresses=$(ip -4 -brief address show scope global | tr -s ' ' | cut -d ' ' -f 3)"
    echo "default=$(ip route show default)"
    echo up
}} >/dev/ttyS1
"""


@pytest.fixture(scope="module")
def machines() -> Iterator[dict[str, VirtualMachine]]:
    """Both, up."""
    image = vm_image()
    with ExitStack() as stack:
        directory = Path(tempfile.mkdtemp(prefix="imdst-"))
        stack.callback(shutil.rmtree, directory)
        lab = Lab()
        stack.callback(lab.close)
        host = VmHost(lab, directory)
        stack.callback(host.close)
        daemon = Daemon(lab)
        stack.callback(daemon.close)
        daemon.start()
        snippets = {name: _add_records(daemon, name, directory) for name in _PLACES}
        leases = {name: f"--dhcp-host={mac},{_ADDRESS}" for name, (_, _, mac) in _PLACES.items()}
        host.nat_network("virbr0", options=(leases["alice"],))
        (option,) = [line for line in snippets["bob"] if line.startswith("dhcp-option=")]
        host.isolated_network("iso0", options=(f"--{option}", leases["bob"]))
        made = {}
        for name, (_, bridge, _) in _PLACES.items():
            made[name] = VirtualMachine(name, lab.host, bridge, _LOGS, _words(snippets[name]))
            stack.callback(made[name].stop)
            made[name].start(image)
        for machine in made.values():
            machine.wait_up()
        yield made


def _add_records(daemon: Daemon, name: str, directory: Path) -> list[str]:
    """Add a network and an instance as the documents say; the lines that the snippet prints."""
    network, bridge, mac = _PLACES[name]
    gateway = "" if name == "bob" else ",gateway=192.168.122.1"
    # The bridges come later.
    words = ("network", "add", network, "--bridge", bridge, "--subnet", f"{_SUBNET}{gateway}")
    assert daemon.command(*words).status == _NOT_IN_FORCE_YET
    user_data, keys = directory / f"{name}.sh", directory / "key.pub"
    user_data.write_text(_USER_DATA.format(name=name))
    keys.write_text(f"{_KEY}\n")
    files = ("--user-data", str(user_data), "--ssh-key", str(keys))
    added = daemon.command("instance", "add", name, "--network", network, "--mac", mac, *files)
    assert added.status == 0, added.err
    return daemon.command("snippet", name, "--for", "qemu").out.splitlines()


def _words(snippet: list[str]) -> tuple[str, ...]:
    """What the snippet adds to QEMU's command line, but for the other end of the network card's cable."""
    text = "\n".join(line for line in snippet if not line.startswith("dhcp-option="))
    words = shlex.split(text.replace("\\\n", " "), comments=True)
    at = words.index("-netdev")
    assert words[at + 1].startswith("bridge,id=net0,br=")
    return (*words[:at], *words[at + 2 :])


@pytest.mark.parametrize("name", _PLACES)
def test_a_stock_machine_has_its_name_its_key_and_what_its_user_data_wrote(
    machines: dict[str, VirtualMachine], name: str
) -> None:
    machine = machines[name]
    assert machine.value("hostname") == name, machine
    assert machine.value("proof") == f"written for {name}", machine
    assert machine.value("keys") == _KEY, machine
    assert machine.value("addresses") == f"{_ADDRESS}/24", machine
    assert bool(machine.value("default")) is (name == "alice"), machine
