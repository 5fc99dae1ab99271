"""Networks that virtual machines are on, as libvirt and others lay them out, with a DHCP server each."""

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from support.lab import Lab, batch, ip, within

_DNSMASQ: Final = "/usr/sbin/dnsmasq"
_STOP_S: Final = 5.0
_SUBNET: Final = "192.168.122"


@dataclass(slots=True)
class VmHost:
    """A lab's host as one that runs virtual machines.

    Attributes:
        directory: Where the DHCP servers keep their leases and logs.
    """

    lab: Lab
    directory: Path
    _servers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def nat_network(self, bridge: str) -> None:
        """A bridge on which the host is the guests' gateway, DHCP as libvirt's `default` network has it."""
        batch(self.lab.host, [*_bridge(bridge), f"address add {_SUBNET}.1/24 dev {bridge}"])
        self.serve_dhcp(self.lab.host, bridge, _SUBNET)

    def isolated_network(self, bridge: str, options: Sequence[str] = ()) -> None:
        """A bridge on which the host has no address; somebody else's machine on it serves DHCP, without a gateway.

        Args:
            options: More of dnsmasq's.
        """
        server = self.lab.namespace(f"{bridge}-dhcp")
        veth = f"link add {bridge}-d up master {bridge} type veth peer name eth0 netns {server}"
        batch(self.lab.host, [*_bridge(bridge), veth])
        batch(server, ["link set eth0 up", f"address add {_SUBNET}.2/24 dev eth0"])
        self.serve_dhcp(server, "eth0", _SUBNET, "--dhcp-option=option:router", *options)

    def serve_dhcp(self, namespace: str, device: str, subnet: str, *options: str) -> None:
        """Start a dnsmasq in a namespace, on a device that has an address of the subnet."""
        name = f"{namespace}-{device}"
        log = self.directory / f"{name}.dnsmasq.log"
        words = [
            *(_DNSMASQ, "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv"),
            *("--no-hosts", "--user=root", "--pid-file=", "--bind-dynamic", "--port=0"),
            *("--except-interface=lo", f"--interface={device}", "--log-facility=-", "--log-dhcp"),
            *("--dhcp-authoritative", "--dhcp-no-override", "--no-ping"),
            f"--dhcp-leasefile={self.directory / name}.leases",
            f"--dhcp-range={subnet}.50,{subnet}.199,255.255.255.0",
            *options,
        ]
        with log.open("wb") as sink:
            process = subprocess.Popen(
                (*within(namespace), *words),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )
        self._servers.append(process)

    def close(self) -> None:
        """End the DHCP servers; the rest goes with the lab."""
        for server in self._servers:
            server.terminate()
            server.wait(_STOP_S)

    def guest_port(self, bridge: str, name: str, mac: str) -> str:
        """A namespace in place of a guest: `eth0` on the bridge, without any address."""
        namespace = self.lab.namespace(name)
        ip(
            *("-n", self.lab.host, "link", "add", f"g-{name}", "up", "master", bridge),
            *("type", "veth", "peer", "name", "eth0", "address", mac, "netns", namespace),
        )
        ip("-n", namespace, "link", "set", "eth0", "up")
        return namespace


def _bridge(name: str) -> list[str]:
    plain = "stp_state 0 forward_delay 0"
    return [f"link add {name} type bridge {plain}", f"link set {name} up"]
