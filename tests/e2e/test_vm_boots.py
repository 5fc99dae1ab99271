"""Stock virtual machines boot with nothing but what `imdsproxy snippet` prints, and each comes up as itself.

Two at once: `alice` on a NAT network as libvirt makes it, and `bob` on an isolated bridge at the same address. Of both
the records have only the MAC. Afterwards bob's cable is plugged into alice's network, where her record has her address.
"""

from __future__ import annotations

import shlex
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from support.daemon import Daemon
from support.demonstration import REPOSITORY
from support.guest import inside
from support.lab import Lab, ip, until, within
from support.vm.image import vm_image
from support.vm.machine import VirtualMachine
from support.vm.networks import VmHost

# Emulated, and the image is made by the first run of the month.
pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(900)]

_LOGS: Final = REPOSITORY / ".cache" / "vm-logs"
_ADDRESS: Final = "192.168.122.50"
_GATEWAY: Final = "192.168.122.1"
_SUBNET: Final = "192.168.122.0/24"
_ALL_CLEAR: Final = 9999
_NOT_IN_FORCE_YET: Final = 75
_MACS: Final = {
    "alice": "52:54:00:aa:00:01",
    "bob": "52:54:00:bb:00:02",
}

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

# Says that the address is its own until somebody believes it.
_THEFT: Final = """python3 - >/dev/ttyS1 2>&1 <<'END'
import http.client, os, socket, time
(device,) = [name for name in os.listdir("/sys/class/net") if name != "lo"]
while True:
    try:
        socket.create_connection(("{gateway}", {all_clear}), 5).close()
        break
    except OSError:
        time.sleep(1)
mac = bytes.fromhex(open(f"/sys/class/net/{{device}}/address").read().strip().replace(":", ""))
own = socket.inet_aton("{address}")
claim = b"\\xff" * 6 + mac + bytes.fromhex("0806" "0001" "0800" "06" "04" "0001") + mac + own + b"\\xff" * 6 + own
wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
wire.bind((device, 0))
for _ in range(100):
    wire.send(claim)
    thief = http.client.HTTPConnection("169.254.169.254", timeout=3, source_address=("{address}", 0))
    try:
        thief.request("GET", "/latest/meta-data/hostname")
        answer = thief.getresponse()
        print(f"stolen={{answer.status}} {{answer.read().decode()!r}}", flush=True)
        break
    except OSError as error:
        print(f"tried={{error!r}}", flush=True)
END
"""


@dataclass(frozen=True, slots=True)
class _Booted:
    """All three, up.

    Attributes:
        key: The private one whose other half is in everybody's record.
    """

    daemon: Daemon
    machines: dict[str, VirtualMachine]
    key: Path


@pytest.fixture(scope="module")
def booted(request: pytest.FixtureRequest) -> Iterator[_Booted]:
    say = request.config.get_terminal_writer()
    image = vm_image()
    say.line(f"\nimage for virtual machines: {image.made_in_s:.0f} s; {image.acceleration()}")
    directory = Path(tempfile.mkdtemp(prefix="imdst-"))
    lab = Lab()
    host = VmHost(lab, directory)
    daemon = Daemon(lab)
    machines: dict[str, VirtualMachine] = {}
    try:
        daemon.start()
        key = _make_key(directory)
        _add_networks(daemon)
        snippets = {name: _add_instance(daemon, name, key) for name in _MACS}
        alice = f"--dhcp-host={_MACS['alice']},{_ADDRESS}"
        host.nat_network("virbr0", options=(alice,))
        (option,) = [line for line in snippets["bob"] if line.startswith("dhcp-option=")]
        bob = f"--dhcp-host={_MACS['bob']},{_ADDRESS}"
        host.isolated_network("iso0", options=(f"--{option}", bob))
        start = time.monotonic()
        for name in _MACS:
            bridge = "iso0" if name == "bob" else "virbr0"
            machine = VirtualMachine(name, lab.host, bridge, _LOGS, _words(snippets[name]))
            machines[name] = machine
            machine.start(image)
        for name, machine in machines.items():
            machine.wait_for("up")
            took = time.monotonic() - start
            worked = f"{machine.worked_s():.0f} s of a processor"
            say.line(f"virtual machine {name}: up {took:.0f} s after both were started, {worked}")
        yield _Booted(daemon, machines, key)
    finally:
        for machine in machines.values():
            machine.stop()
        daemon.close()
        host.close()
        lab.close()
        subprocess.run(["/usr/bin/rm", "-r", str(directory)], check=True)


def _make_key(directory: Path) -> Path:
    key = directory / "key"
    words = ("/usr/bin/ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "imdst", "-f", str(key))
    subprocess.run(words, check=True)
    return key


def _add_networks(daemon: Daemon) -> None:
    gateway = f"{_SUBNET},gateway={_GATEWAY}"
    for name, bridge, subnet in (("nat", "virbr0", gateway), ("isolated", "iso0", _SUBNET)):
        words = ("network", "add", name, "--bridge", bridge, "--subnet", subnet)
        # The bridges come later.
        assert daemon.command(*words).status == _NOT_IN_FORCE_YET


def _add_instance(daemon: Daemon, name: str, key: Path) -> list[str]:
    """Add a record as the documents say; the lines that the snippet prints."""
    script = _USER_DATA.format(name=name)
    if name == "bob":
        script += _THEFT.format(gateway=_GATEWAY, all_clear=_ALL_CLEAR, address=_ADDRESS)
    user_data = key.with_name(f"{name}.sh")
    user_data.write_text(script)
    words = (*_port(name), "--user-data", str(user_data), "--ssh-key", f"{key}.pub")
    _run(daemon, "instance", "add", name, *words)
    return _run(daemon, "snippet", name, "--for", "qemu").splitlines()


def _run(daemon: Daemon, *words: str) -> str:
    done = daemon.command(*words)
    assert done.status == 0, done.err
    return done.out


def _words(snippet: list[str]) -> tuple[str, ...]:
    """What the snippet adds to QEMU's command line, but for the other end of the network card's cable."""
    text = "\n".join(line for line in snippet if not line.startswith("dhcp-option="))
    words = shlex.split(text.replace("\\\n", " "), comments=True)
    at = words.index("-netdev")
    assert words[at + 1].startswith("bridge,id=net0,br=")
    return (*words[:at], *words[at + 2 :])


@pytest.mark.parametrize("name", ["alice", "bob"])
def test_a_stock_machine_has_its_name_its_key_and_what_its_user_data_wrote(
    booted: _Booted, name: str
) -> None:
    machine = booted.machines[name]
    public = booted.key.with_suffix(".pub").read_text().strip()
    assert machine.value("hostname") == name, machine
    assert machine.value("proof") == f"written for {name}", machine
    assert machine.value("keys") == public, machine


def test_two_machines_at_one_address_on_two_networks_each_come_up_as_themselves(
    booted: _Booted,
) -> None:
    alice, bob = booted.machines["alice"], booted.machines["bob"]
    assert alice.value("addresses") == bob.value("addresses") == f"{_ADDRESS}/24"
    assert (alice.value("hostname"), bob.value("hostname")) == ("alice", "bob")
    assert (alice.value("default") != "", bob.value("default")) == (True, "")


def test_the_key_opens_the_machine(booted: _Booted) -> None:
    options: tuple[str, ...] = (
        "-i",
        str(booted.key),
        "-o",
        "StrictHostKeyChecking=no",
        "-o",
        "ConnectTimeout=30",
    )
    options += ("-o", "UserKnownHostsFile=/dev/null", "-o", "BatchMode=yes", "-o", "LogLevel=ERROR")
    done = subprocess.run(
        (
            *within(booted.daemon.lab.host),
            *("/usr/bin/ssh", *options, f"debian@{_ADDRESS}", "cat /srv/proof"),
        ),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.stdout == "written for alice\n", done.stderr


def test_a_machine_that_takes_its_neighbours_address_is_answered_403(booted: _Booted) -> None:
    bob = booted.machines["bob"]
    _run(booted.daemon, "instance", "set", "alice", *_port("alice"), "--address", _ADDRESS)
    clear = inside(booted.daemon.lab.host, lambda: socket.create_server((_GATEWAY, _ALL_CLEAR)))
    try:
        with clear:
            bob.plug("virbr0")
            until(
                lambda: bob.value("stolen"), within_s=60, what=f"bob's answer ({bob})", pause_s=0.2
            )
    finally:
        # The address is alice's alone again, also in the host's neighbour table, whichever test comes next.
        bob.plug("iso0")
        ip("-n", booted.daemon.lab.host, "neigh", "flush", "dev", "virbr0")
    assert bob.value("stolen").startswith("403"), bob
    assert "alice" not in bob.value("stolen")


def _port(name: str) -> tuple[str, ...]:
    return "--network", "isolated" if name == "bob" else "nat", "--mac", _MACS[name]
