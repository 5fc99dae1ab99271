"""A host with networks of every kind and guests behind them, all with the same addresses.

The daemon's "host" is a namespace of its own, so that bridges, interfaces and metrics ports of a lab touch
neither the machine nor another lab. Every name begins with `imdst-` and a token.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from support.guest import Guest, inside
from support.patience import patience
from support.reaper import reap, reap_at_the_end

RecordMapping = dict[str, object]

GUEST_CIDR4: Final = "10.0.0.0/24"
GUEST_CIDR6: Final = "2001:db8::/64"
NETNS: Final = Path("/run/netns")
BRIDGE_MAC: Final = "02:fe:a9:fe:a9:fe"
"""Of every bridge that guests are on."""

_SETTINGS: Final = {
    "ipv6/conf/all/disable_ipv6": "0",
    "ipv6/conf/default/disable_ipv6": "0",
    "ipv6/conf/all/accept_dad": "0",
    "ipv6/conf/default/accept_dad": "0",
    "ipv6/conf/default/addr_gen_mode": "0",
    "ipv6/conf/default/accept_ra": "0",
}
_PLAIN: Final = "forward_delay 0 stp_state 0 mcast_snooping 0"
_METADATA: Final = (("169.254.169.254/32",), ("fe80::a9fe:a9fe/64", "nodad"))

SERVER: Final = """
import os, socket, sys
address, device, reuse, uid, port, answer = sys.argv[1:7]
port = int(port)
v6 = ":" in address
def listen():
    made = socket.socket(socket.AF_INET6 if v6 else socket.AF_INET)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if reuse == "1":
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    return made
listener = listen()
scope = socket.if_nametoindex(device) if v6 and device else 0
if device:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
if int(uid):
    # A socket belongs to the user that makes it; ports below 1024 are opened for the namespace.
    with open("/proc/sys/net/ipv4/ip_unprivileged_port_start", "w") as file:
        file.write("0")
    listener.close()
    os.setuid(int(uid))
    listener = listen()
listener.bind((address, port, 0, scope) if v6 else (address, port))
listener.listen()
print("ready", flush=True)
while True:
    connection, peer = listener.accept()
    connection.sendall(answer.replace("PEER", peer[0]).encode())
    connection.close()
"""

FOREIGN: Final = "HTTP/1.1 200 OK\r\nContent-Length: 7\r\nConnection: close\r\n\r\nforeign"


def serve(
    place: Sequence[str],
    address: str,
    device: str = "",
    *,
    reuse_port: bool,
    uid: int = 0,
    port: int = 80,
    answer: str = FOREIGN,
) -> Server:
    """Start a foreign program at a port of an address.

    Args:
        place: The words before it (`within`).
        uid: Whose its socket is.
        answer: With `PEER` for the client's address.
    """
    words = (address, device, "1" if reuse_port else "0", str(uid), str(port), answer)
    process = subprocess.Popen(
        (*place, sys.executable, "-c", SERVER, *words),
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return Server(process)


def until(
    holds: Callable[[], object], *, within_s: float = 10.0, what: str = "", pause_s: float = 0.05
) -> float:
    """Poll until something holds; how many seconds that took. Fails when it takes too long.

    Args:
        within_s: On a machine that is not busy with other things (see `patience`).
        what: It, in words.
        pause_s: The longest pause at first: a look at a daemon's status costs it 4 ms of a processor.
            A long wait pauses for a tenth of the time passed, so that looks do not keep processors busy.
    """
    start = time.monotonic()
    pause = 0.005
    while not holds():
        passed = time.monotonic() - start
        assert passed < within_s * patience(), f"{what or 'it'} does not hold after {passed:.2f} s"
        time.sleep(pause)
        pause = min(2 * pause, max(pause_s, passed / 10))
    return time.monotonic() - start


@dataclass(slots=True)
class Server:
    """A foreign program that listens at a metadata address."""

    process: subprocess.Popen[bytes]

    @property
    def pid(self) -> int:
        return self.process.pid

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None and not self.process.stdout.closed:
            self.process.stdout.close()


@dataclass(frozen=True, slots=True)
class LabState:
    """What a lab consists of at one moment."""

    namespaces: frozenset[str]
    links: frozenset[str]
    places: Mapping[str, tuple[str, str]]


@dataclass(slots=True)
class Lab:
    """Makes networks and guests, and takes all of it away.

    Args:
        host_of: A process in whose namespace the daemon runs; a new one is made without it.
    """

    token: str = field(default_factory=lambda: secrets.token_hex(2))
    host_of: int | None = None
    _namespaces: list[str] = field(default_factory=list)
    _intruders: list[Server] = field(default_factory=list)
    _places: dict[str, tuple[str, str]] = field(default_factory=dict)
    _guests: int = 0

    def __post_init__(self) -> None:
        for begin in (self.name(""), self.prefix):
            reap_at_the_end(namespaces=begin)
        self.namespace("host", of=self.host_of)

    @property
    def host(self) -> str:
        """The namespace that is the daemon's host."""
        return self.name("host")

    @property
    def prefix(self) -> str:
        """What the daemon's own namespaces and links begin with (six characters at most)."""
        return f"td{self.token}"

    def name(self, what: str) -> str:
        return f"imdst-{self.token}-{what}"

    def namespace(self, what: str, *, of: int | None = None) -> str:
        """Make a namespace as another program would: `ip netns add`; or give a process's a name."""
        name = self.name(what)
        if name not in self._namespaces:
            self._namespaces.append(name)
        ip("netns", *(("add", name) if of is None else ("attach", name, str(of))))
        inside(name, _write_settings)
        ip("-n", name, "link", "set", "lo", "up")
        return name

    def delete_namespace(self, what: str) -> None:
        ip("netns", "del", self.name(what))

    def namespace_network(self, network: str, *, addresses: bool = True) -> RecordMapping:
        """A network whose namespace somebody else has made, with the metadata addresses in it."""
        self.furnish(network, addresses=addresses)
        return record(network, {"namespace": self.name(network)})

    def furnish(self, network: str, *, addresses: bool = True) -> None:
        """Make a network's namespace and the bridge in it."""
        self._places[network] = (self.namespace(network), "br0")
        self.remake_bridge(network, addresses=addresses)

    def remake_bridge(self, network: str, *, addresses: bool = True) -> None:
        """Make the bridge that a network's guests are on anew, whether it is there or not."""
        place, bridge = self._places[network]
        lines = _bridge(bridge)
        if bridge == "br0":
            # The way back to the guests is the business of whoever made the namespace.
            lines += ["address add 10.0.0.1/24 dev br0", "address add 2001:db8::1/64 dev br0 nodad"]
        if addresses:
            lines += [f"address add {' '.join(words)} dev {bridge}" for words in _METADATA]
        if bridge in _links(place):
            lines.insert(0, f"link del {bridge}")
        batch(place, lines)

    def bridge_network(self, network: str) -> RecordMapping:
        """A network that is a bridge of the host."""
        return self._host_network(network, "bridge")

    def interface_network(self, network: str) -> RecordMapping:
        """A network behind an interface of the host."""
        return self._host_network(network, "interface")

    def _host_network(self, network: str, kind: str) -> RecordMapping:
        batch(self.host, _bridge(network))
        self._places[network] = (self.host, network)
        return record(network, {kind: network})

    def guest(
        self,
        network: str,
        number: int = 5,
        *,
        mac: str | None = None,
        name: str | None = None,
        privacy: str | None = None,
    ) -> Guest:
        """Plug a guest in: 10.0.0.`number` and 2001:db8::`number`, as in every other network.

        Args:
            privacy: A link-local address to have in place of the one that its MAC makes.
        """
        self._guests += 1
        name = name or f"{network}-g{number}"
        mac = mac or f"fa:16:3e:00:{number >> 8:02x}:{number & 255:02x}"
        namespace = self.namespace(name)
        place, bridge = self._places[network]
        plug(place, f"v{self._guests}", namespace, mac=mac, bridge=bridge)
        lines = [
            "link set eth0 up",
            f"address add 10.0.0.{number}/24 dev eth0",
            f"address add 2001:db8::{number:x}/64 dev eth0 nodad",
            "route add 169.254.169.254/32 dev eth0",
        ]
        if privacy is not None:
            lines.insert(0, "link set eth0 addrgenmode none")
            lines.append(f"address add {privacy}/64 dev eth0 nodad")
        batch(namespace, lines)
        return Guest(name, namespace, network, mac, (f"10.0.0.{number}", f"2001:db8::{number:x}"))

    def replug(self, guest: Guest) -> None:
        """Plug a guest into its network's namespace again, which was made anew."""
        if (NETNS / guest.namespace).exists():
            ip("netns", "del", guest.namespace)
        number = int(guest.addresses[0].rpartition(".")[2])
        self.guest(guest.network, number, mac=guest.mac, name=guest.name)

    def remove_guest(self, guest: Guest) -> None:
        """Unplug a guest for good: its addresses and its MAC are free again."""
        ip("netns", "del", guest.namespace)

    def intrude(
        self, namespace: str, address: str, *, device: str = "", reuse_port: bool
    ) -> Server:
        """Start a foreign program at port 80 of an address."""
        intruder = serve(within(namespace), address, device, reuse_port=reuse_port)
        self._intruders.append(intruder)
        return intruder

    def state(self) -> LabState:
        """What there is now, to come back to with `restore`."""
        return LabState(frozenset(self._own()), frozenset(self.host_links()), dict(self._places))

    def restore(self, state: LabState, guests: Iterable[Guest]) -> None:
        """Have again what there was at `state`, and nothing else."""
        for intruder in self._intruders:
            intruder.stop()
        self._intruders.clear()
        for name in set(self._own()) - state.namespaces:
            ip("netns", "del", name)
        for name in set(self.host_links()) - state.links:
            if name in self._places:
                ip("-n", self.host, "link", "del", name)
        self._places = dict(state.places)
        for network, (place, bridge) in self._places.items():
            if not (NETNS / place).exists():
                self.furnish(network)
            elif bridge not in _links(place):
                self.remake_bridge(network, addresses=place != self.host)
        for guest in guests:
            if not (NETNS / guest.namespace).exists() or guest.device not in _links(
                guest.namespace
            ):
                self.replug(guest)

    def forget_neighbours(self) -> None:
        """Have the networks forget which MAC has an address: a guest that took another's would have it for seconds."""
        for place in {*self.made_by_daemon(), *(place for place, _ in self._places.values())}:
            ip("-n", place, "neigh", "flush", "all")

    @contextlib.contextmanager
    def neighbour(self, network: str, address: str, mac: str) -> Iterator[None]:
        """Have the neighbour table of a network's namespace hold a MAC for an address, whatever its guest sends."""
        place, bridge = self._places[network]
        entry = (address, "lladdr", mac, "dev", bridge)
        ip("-n", place, "neigh", "replace", *entry, "nud", "permanent")
        try:
            yield
        finally:
            ip("-n", place, "neigh", "del", *entry)

    def _own(self) -> list[str]:
        return [name for name in self.leftovers() if not name.startswith(self.prefix)]

    def close(self) -> None:
        """Take everything away; what the daemon made and left too, so that tests can see it first."""
        for intruder in self._intruders:
            intruder.stop()
        reap(namespaces=(self.name(""), self.prefix))

    def leftovers(self) -> list[str]:
        """Namespaces of this lab and its daemon that exist."""
        if not NETNS.is_dir():
            return []
        ours = (f"imdst-{self.token}-", self.prefix)
        return sorted(entry.name for entry in NETNS.iterdir() if entry.name.startswith(ours))

    def made_by_daemon(self) -> list[str]:
        """Namespaces that the daemon made and has not taken away."""
        return [name for name in self.leftovers() if name.startswith(self.prefix)]

    def host_links(self) -> list[str]:
        """Links of the daemon's host, without the kernel's own."""
        return sorted(_links(self.host) - {"lo"})


def record(network: str, listener: Mapping[str, object]) -> RecordMapping:
    """A network's record, with the addresses that all of them share."""
    return {
        "id": network,
        "listener": dict(listener),
        "subnets": [
            {"cidr": GUEST_CIDR4, "gateway": "10.0.0.1", "dns": ["10.0.0.2"]},
            {"cidr": GUEST_CIDR6},
        ],
    }


def within(namespace: str) -> tuple[str, ...]:
    """The words before a command that is to run in a namespace.

    Not `ip netns exec`: it would keep a copy of every mount of /run/netns alive.
    """
    return ("/usr/bin/nsenter", f"--net={NETNS / namespace}", "--")


def processes_in(namespace: str) -> Iterator[int]:
    """The pids in a namespace."""
    text = run("/usr/sbin/ip", "netns", "pids", namespace)
    return (int(word) for word in text.split())


def ip(*arguments: str) -> str:
    """Run ip(8)."""
    return run("/usr/sbin/ip", *arguments)


def batch(namespace: str, lines: Iterable[str]) -> None:
    """Run several lines of ip(8) in a namespace."""
    run("/usr/sbin/ip", "-n", namespace, "-batch", "-", stdin="\n".join(lines) + "\n")


def run(
    *arguments: str,
    stdin: str = "",
    cwd: Path | None = None,
    timeout_s: float = 60,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Run a command, which must succeed, to its end and give back what it printed.

    Args:
        timeout_s: On a machine that is not busy with other things (see `patience`).
        environment: Beside this process's own.
    """
    done = subprocess.run(
        arguments,
        input=stdin,
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=timeout_s * patience(),
        check=False,
    )
    said = f"{done.stdout[-5000:]}{done.stderr[-5000:]}"
    assert done.returncode == 0, (
        f"{' '.join(arguments)} ended with {done.returncode}\n{stdin}{said}"
    )
    return done.stdout


def plug(
    place: str, device: str, namespace: str, *, mac: str = "", bridge: str = "", mtu: int = 1500
) -> None:
    """Make a cable from a device, which is up, to `eth0` in another namespace.

    Args:
        place: The namespace of the device.
        mac: Of `eth0`; the kernel's choice by default.
        bridge: That the device is a port of, if any.
    """
    here = ("master", bridge) if bridge else ()
    there = ("address", mac) if mac else ()
    ip(
        *("-n", place, "link", "add", device, "mtu", str(mtu), *here, "type", "veth"),
        *("peer", "name", "eth0", *there, "mtu", str(mtu), "netns", namespace),
    )
    ip("-n", place, "link", "set", device, "up")


@contextlib.contextmanager
def cut(namespace: str, ports: int | str, verdict: str = "drop") -> Iterator[None]:
    """No packet from or to these TCP ports passes in a namespace during the block.

    Args:
        ports: One, or a set as nft(8) writes it.
        verdict: What becomes of them.
    """
    rules = " ".join(f"tcp {side} {ports} {verdict};" for side in ("sport", "dport"))
    chains = "\n".join(
        f"chain {hook} {{ type filter hook {hook} priority 0; {rules} }}"
        for hook in ("input", "output")
    )
    nft = (*within(namespace), "nft")
    run(*nft, "-f", "-", stdin=f"table inet cut {{\n{chains}\n}}\n")
    try:
        yield
    finally:
        run(*nft, "delete", "table", "inet", "cut")


def _links(namespace: str) -> set[str]:
    text = inside(namespace, Path("/proc/thread-self/net/dev").read_text)
    return {line.partition(":")[0].strip() for line in text.splitlines()[2:]}


def _bridge(name: str) -> list[str]:
    return [
        # A bridge that has no address of its own changes it with its ports: guests would not find it.
        f"link add {name} address {BRIDGE_MAC} type bridge {_PLAIN}",
        f"link set {name} up",
    ]


def _write_settings() -> None:
    for key, value in _SETTINGS.items():
        Path("/proc/sys/net", key).write_text(value)
