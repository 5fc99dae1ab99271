"""The machines of docs/how-to/fleet.md: members of etcd, hubs and hosts, each a systemd in namespaces of its own.

They are on one bridge, know each other by /etc/hosts, and let in what the page's table of ports has and nothing more.
The first hub has an SSH key that the others accept, as an administrator's machine.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Final

from support.demonstration import REPOSITORY
from support.document_blocks import Block, blocks_of, missing_lines, section
from support.guest import Guest
from support.lab import Lab, ip, run
from support.packaged_daemon import PackagedDaemon, machine_with_dependencies
from support.packages import Packages, build_packages, unpacked
from support.systemd_machine import Machine, systemd_machine

PAGE: Final = REPOSITORY / "docs/how-to/fleet.md"
ADDRESSES: Final = {
    "etcd1": "10.251.0.1",
    "etcd2": "10.251.0.2",
    "etcd3": "10.251.0.3",
    "hub1": "10.251.0.11",
    "hub2": "10.251.0.12",
    "host1": "10.251.0.21",
    "host2": "10.251.0.22",
}
MEMBERS: Final = ("etcd1", "etcd2", "etcd3")
HUBS: Final = ("hub1", "hub2")
HOSTS: Final = ("host1", "host2")
_KINDS: Final = {"members": MEMBERS, "hubs": HUBS, "hosts": HOSTS, "operators": HUBS[:1]}
_GUESTS: Final = {
    "web": ("52:54:00:12:34:56", "10.0.0.5"),
    "other": ("52:54:00:12:34:99", "10.0.0.99"),
}
"""On each host, as one that moves is on two: the page's instance, and one that the fleet does not know."""
_SSH: Final = ("openssh-server", "libwrap0", "libwtmpdb0")
_PLACE: Final = re.compile(r"# (?:on (?P<machines>[\w ,]+)|in (?P<guest>\w+) on (?P<host>\w+))\n")
_RUN_S: Final = 100
_PORTS_HEADING: Final = "### Ports"
_PORTS: Final = """
table inet ports {{
    chain in {{
        type filter hook input priority 0; policy drop
        iifname != "eth0" accept
        ct state established,related accept
        ip saddr {administrator} tcp dport 22 accept
        {rules}
    }}
}}
"""
# Resets let both ends know at once.
_CUT: Final = """
table inet cut {{
    chain in {{
        type filter hook input priority -10
        ip saddr {address} tcp flags & rst == 0 reject with tcp reset
    }}
    chain out {{
        type filter hook output priority -10
        ip daddr {address} tcp flags & rst == 0 reject with tcp reset
    }}
}}
"""


@dataclass(frozen=True, slots=True)
class Placed:
    """A block, and where it is run.

    Attributes:
        machines: One after the other.
        guest: The guest there that it is run in, or nothing.
    """

    block: Block
    machines: tuple[str, ...]
    guest: str


def placed_blocks(heading: str) -> list[Placed]:
    """The blocks below a heading of the page."""
    return [_placed(block) for block in blocks_of(PAGE, heading)]


def _placed(block: Block) -> Placed:
    found = _PLACE.match(block.script)
    assert found is not None, f"line {block.line}: the block does not begin with where it is run"
    assert block.script.count("\n# on ") == 0, f"line {block.line}: no prose between two blocks"
    if found["guest"]:
        return Placed(block, (found["host"],), found["guest"])
    machines = tuple(re.findall(r"\w+\d\b", found["machines"]))
    assert machines, f"line {block.line}: no machine in {found[0]}"
    return Placed(block, machines, "")


def table_of(heading: str) -> list[tuple[str, ...]]:
    """The rows of the first table below a heading."""
    _, lines = section(PAGE, heading)
    first = next(number for number, line in enumerate(lines) if line.startswith("|"))
    rows = takewhile(lambda line: line.startswith("|"), lines[first + 2 :])
    return [tuple(cell.strip() for cell in row.strip("|").split("|")) for row in rows]


@dataclass(slots=True)
class FleetMachines:
    """They, and what of the page was run on them.

    Attributes:
        words: What a reader replaces, and by what: some are found while the page is followed.
        replaced: Which of them were found in a block.
        ran: The lines where blocks begin that were run, in the order of their first times.
    """

    machines: Mapping[str, Machine]
    words: dict[str, str] = field(default_factory=dict)
    replaced: set[str] = field(default_factory=set)
    ran: list[int] = field(default_factory=list)

    def follow(self, heading: str, *numbers: int) -> str:
        """Run the blocks below a heading, or some of them by their numbers from 0; what all have printed."""
        blocks = placed_blocks(heading)
        chosen = [blocks[number] for number in numbers] if numbers else blocks
        return "".join(self.run(one, machine) for one in chosen for machine in one.machines)

    def run(self, placed: Placed, machine: str) -> str:
        """Run a block on one of its machines; what it printed."""
        script = placed.block.script
        for word, value in self.words.items():
            if word in script:
                self.replaced.add(word)
            script = script.replace(word, value.format(machine=machine))
        place = self.machines[machine]
        (place.root / "srv/block").write_text(script)
        shell = "export HOME=/root && cd && exec bash -euo pipefail /srv/block"
        words: tuple[str, ...] = ("sh", "-c", shell)
        if placed.guest:
            words = ("nsenter", f"--net=/run/netns/{placed.guest}", *words)
        status, output = place.attempt("timeout", str(_RUN_S), *words)
        where = f"the block of line {placed.block.line} on {machine}"
        print(f"== {where}\n{script}\n-- {status}\n{output}")  # noqa: T201 - pytest shows it of a test that failed
        assert status == 0, f"{where} ended with {status}:\n{output}"
        missing = missing_lines(placed.block, output)
        assert not missing, f"{where} did not print {missing}:\n{output}"
        if placed.block.line not in self.ran:
            self.ran.append(placed.block.line)
        return output

    def guest(self, host: str, name: str = "web") -> Guest:
        """A guest on a host."""
        mac, address = _GUESTS[name]
        place = self.machines[host].root / "run/netns"
        return Guest(name, name, "blue", mac, (address,), directory=place)

    @contextlib.contextmanager
    def cut_off(self, host: str) -> Iterator[None]:
        """No hub reaches a host, nor it them, during the block."""
        for hub in HUBS:
            self.machines[hub].run("nft", "-f", "-", text=_CUT.format(address=ADDRESSES[host]))
        try:
            yield
        finally:
            for hub in HUBS:
                self.machines[hub].run("nft", "delete", "table", "inet", "cut")


@contextlib.contextmanager
def open_fleet_machines(work: Path) -> Iterator[FleetMachines]:
    """Boot them all: Debian's packages are installed, and imdsproxy on hubs and hosts."""
    packages = build_packages()
    trees = [unpacked(name) for name in _SSH]
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(work / "id_ed25519"))
    lab = Lab()
    # A machine ends with the thread that has booted it: the pool is there to the end.
    with ThreadPoolExecutor(len(ADDRESSES)) as pool, contextlib.ExitStack() as stack:
        stack.callback(lab.close)
        ip("-n", lab.host, "link", "add", "wire", "type", "bridge", "forward_delay", "0")
        ip("-n", lab.host, "link", "set", "wire", "up")

        def boot(name: str) -> Machine:
            place = work / name
            place.mkdir()
            is_member = name in MEMBERS
            opened = (
                systemd_machine(place) if is_member else machine_with_dependencies(place, packages)
            )
            machine = stack.enter_context(opened)
            run("cp", "--archive", *(f"{tree}/." for tree in trees), str(machine.root))
            _connect(lab, machine, name)
            _accept_ssh(machine, name, work)
            if is_member:
                # As Debian's package leaves it.
                machine.run("systemctl", "start", "etcd")
            else:
                _install(machine, packages)
            if name in HOSTS:
                _plug_in(machine)
            return machine

        booting = {name: pool.submit(boot, name) for name in ADDRESSES}
        wait(booting.values())
        machines = {name: one.result() for name, one in booting.items()}
        try:
            yield FleetMachines(machines)
        except BaseException:
            for name, machine in machines.items():
                print(f"==== {name}\n{machine.journal()}")  # noqa: T201 - as above
            raise


def _connect(lab: Lab, machine: Machine, name: str) -> None:
    """Give a machine its name, its address, the names of the others, and the page's firewall."""
    address = ADDRESSES[name]
    pair = ("type", "veth", "peer", "name", "eth0", "netns", str(machine.init))
    ip("-n", lab.host, "link", "add", name, "master", "wire", *pair)
    ip("-n", lab.host, "link", "set", name, "up")
    lines = f"address add {address}/24 dev eth0\nlink set eth0 up\n"
    machine.run("ip", "-batch", "-", text=lines)
    rules = (
        f"ip saddr {ADDRESSES[source]} tcp dport {port} accept"
        for sources, targets, port, _ in table_of(_PORTS_HEADING)
        if name in _KINDS[targets]
        for source in _KINDS[sources]
    )
    text = _PORTS.format(administrator=ADDRESSES[HUBS[0]], rules="\n".join(rules))
    machine.run("nft", "-f", "-", text=text)
    machine.run("hostname", name)
    names = "".join(f"{at} {one}.example.net {one}\n" for one, at in ADDRESSES.items())
    (machine.root / "etc/hosts").write_text(f"127.0.0.1 localhost\n{names}")


def _accept_ssh(machine: Machine, name: str, work: Path) -> None:
    key, public = work / "id_ed25519", (work / "id_ed25519.pub").read_text()
    ssh = machine.root / "root/.ssh"
    machine.run("install", "-d", "-m", "700", "/root/.ssh", "/run/sshd")
    (ssh / "authorized_keys").write_text(public)
    (ssh / "known_hosts").write_text(f"*.example.net {public}")
    own = ssh / "id_ed25519" if name == HUBS[0] else ssh / "host_key"
    own.write_bytes(key.read_bytes())
    own.chmod(0o600)
    machine.run("systemd-sysusers", "openssh-server.conf")
    options = (
        "-f",
        "/dev/null",
        "-h",
        f"/root/.ssh/{own.name}",
        "-o",
        "Subsystem=sftp internal-sftp",
    )
    machine.run("systemd-run", "--quiet", "--unit=sshd", "/usr/sbin/sshd", "-D", *options)


def _install(machine: Machine, packages: Packages) -> None:
    """Install imdsproxy, which is not started: seven machines boot at once, and the page starts what it needs."""
    policy = machine.root / "usr/sbin/policy-rc.d"
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    PackagedDaemon(machine).replace(packages)
    policy.unlink()


def _plug_in(machine: Machine) -> None:
    """The bridge that the page speaks of, and the guests behind it."""
    machine.run("ip", "link", "add", "br-blue", "up", "type", "bridge", "forward_delay", "0")
    for name, (mac, address) in _GUESTS.items():
        machine.run("ip", "netns", "add", name)
        pair = ("type", "veth", "peer", "name", "eth0", "address", mac, "netns", name)
        machine.run("ip", "link", "add", f"tap-{name}", "master", "br-blue", "up", *pair)
        lines = f"address add {address}/24 dev eth0\nlink set eth0 up\nroute add 169.254.169.254/32 dev eth0\n"
        machine.run("ip", "-n", name, "-batch", "-", text=lines)
