"""Namespaces as Neutron's L3 agent makes them, by hand: routers with guests behind them, and what is outside."""

import contextlib
import socket
import struct
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from support.guest import Guest, inside
from support.lab import NETNS, Lab, batch, ip, plug, run, until, within
from support.reaper import reap_at_the_end
from support.wire import tapped

OUTSIDE: Final = "198.51.100.1"
_METADATA: Final = (
    socket.inet_aton("169.254.169.254"),
    socket.inet_pton(socket.AF_INET6, "fe80::a9fe:a9fe"),
)


@dataclass(slots=True)
class Router:
    """One router: its namespace is that of a lab under another name."""

    id: str
    what: str
    link: Path
    _devices: int = 0

    @property
    def name(self) -> str:
        """Of its namespace, as imdsproxy sees it."""
        return self.link.name

    def next_device(self) -> str:
        self._devices += 1
        return f"qr-{self.id[:8]}{self._devices:x}"


@dataclass(slots=True)
class RouterLab:
    """Makes routers in a directory of namespaces that no other test has."""

    lab: Lab = field(default_factory=Lab)
    directory: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="imdst-netns-")))
    routers: dict[str, Router] = field(default_factory=dict)

    def __post_init__(self) -> None:
        reap_at_the_end(directory=self.directory)

    def add(self, what: str) -> Router:
        """Make a router's namespace, with nothing in it."""
        known = self.routers.get(what)
        router_id = str(uuid.uuid4()) if known is None else known.id
        namespace = self.lab.namespace(what)
        # As the agent does it.
        for setting in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
            inside(namespace, partial(Path("/proc/sys/net", setting).write_text, "1"))
        made = Router(router_id, what, self.directory / f"qrouter-{router_id}")
        self.routers[what] = made
        made.link.symlink_to(NETNS / namespace)
        return made

    def remove(self, what: str) -> None:
        """Remove a router's namespace."""
        self.routers[what].link.unlink()
        self.lab.delete_namespace(what)

    def namespace(self, what: str) -> str:
        return self.lab.name(what)

    def guest(self, what: str, name: str, subnet: int, number: int) -> Guest:
        """Plug a guest into a network of its own, 10.0.`subnet`.0/24, behind the router."""
        router, namespace = self.routers[what], self.lab.namespace(name)
        device = router.next_device()
        mac = f"fa:16:3e:00:{subnet:02x}:{number:02x}"
        plug(self.namespace(what), device, namespace, mac=mac)
        batch(self.namespace(what), [f"address add 10.0.{subnet}.1/24 dev {device}"])
        batch(
            namespace,
            [
                "link set eth0 up",
                f"address add 10.0.{subnet}.{number}/24 dev eth0",
                f"route add default via 10.0.{subnet}.1",
            ],
        )
        inner = _link_local(self.namespace(what), device)
        # As radvd announces it.
        ip("-n", namespace, "route", "add", "fe80::a9fe:a9fe/128", "via", inner, "dev", "eth0")
        return Guest(name, namespace, router.id, mac, (f"10.0.{subnet}.{number}",))

    def gateway(self, what: str) -> str:
        """Give a router a way outside; the namespace that is there."""
        outside = self.lab.namespace(f"{what}-out")
        plug(self.namespace(what), "qg-1", outside)
        batch(
            outside,
            [
                "link set eth0 up",
                f"address add {OUTSIDE}/24 dev eth0",
                "route add default via 198.51.100.2",
            ],
        )
        batch(
            self.namespace(what),
            [
                "address add 198.51.100.2/24 dev qg-1",
                f"route add default via {OUTSIDE}",
            ],
        )
        return outside

    def tables(self, what: str) -> str:
        return run(*within(self.namespace(what)), "nft", "list", "tables")

    def close(self) -> None:
        for router in self.routers.values():
            router.link.unlink(missing_ok=True)
        self.lab.close()
        self.directory.rmdir()


def _link_local(namespace: str, device: str) -> str:
    """A device's own address; the kernel gives it a moment after both ends are up."""
    found: list[str] = []

    def look() -> bool:
        text = inside(namespace, Path("/proc/thread-self/net/if_inet6").read_text)
        words = (line.split() for line in text.splitlines())
        found[:] = [one[0] for one in words if one[5] == device and one[0].startswith("fe80")]
        return bool(found)

    until(look, what=f"an address of {device}")
    return socket.inet_ntop(socket.AF_INET6, bytes.fromhex(found[0]))


@contextlib.contextmanager
def sniffing(namespace: str) -> Iterator[list[bytes]]:
    """Every packet to or from a metadata address that is seen in a namespace."""
    found: list[bytes] = []

    def take(frame: bytes) -> None:
        (kind,) = struct.unpack_from(">H", frame, 12)
        addresses = frame[26:34] if kind == 0x800 else frame[22:54]
        if kind in (0x800, 0x86DD) and any(one in addresses for one in _METADATA):
            found.append(frame)

    with tapped(namespace, take):
        yield found
