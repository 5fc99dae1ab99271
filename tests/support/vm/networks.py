"""Networks that virtual machines are on, as libvirt and others lay them out, with a DHCP server each."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from support.lab import Lab, batch, ip, within

_DNSMASQ: Final = "/usr/sbin/dnsmasq"
_STOP_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class DhcpServer:
    """A dnsmasq."""

    process: subprocess.Popen[bytes]
    log: Path

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(_STOP_S)


@dataclass(slots=True)
class VmHost:
    """A lab's host as one that runs virtual machines.

    Attributes:
        directory: Where the DHCP servers keep their leases and logs.
    """

    lab: Lab
    directory: Path
    _servers: list[DhcpServer] = field(default_factory=list)

    def nat_network(
        self, bridge: str, subnet: str = "192.168.122", options: Sequence[str] = ()
    ) -> None:
        """A bridge on which the host is the guests' gateway, DHCP as libvirt's `default` network has it.

        Args:
            options: More of dnsmasq's.
        """
        batch(
            self.lab.host,
            [
                f"link add {bridge} type bridge stp_state 0 forward_delay 0",
                f"link set {bridge} up",
                f"address add {subnet}.1/24 dev {bridge}",
            ],
        )
        self.serve_dhcp(self.lab.host, bridge, subnet, *options)

    def isolated_network(
        self, bridge: str, subnet: str = "192.168.122", options: Sequence[str] = ()
    ) -> None:
        """A bridge on which the host has no address; somebody else's machine on it serves DHCP, without a gateway.

        Args:
            options: More of dnsmasq's.
        """
        server = self.lab.namespace(f"{bridge}-dhcp")
        batch(
            self.lab.host,
            [
                f"link add {bridge} type bridge stp_state 0 forward_delay 0",
                f"link set {bridge} up",
                f"link add {bridge}-d up master {bridge} type veth peer name eth0 netns {server}",
            ],
        )
        batch(server, ["link set eth0 up", f"address add {subnet}.2/24 dev eth0"])
        self.serve_dhcp(server, "eth0", subnet, "--dhcp-option=option:router", *options)

    def serve_dhcp(self, namespace: str, device: str, subnet: str, *options: str) -> DhcpServer:
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
        server = DhcpServer(process, log)
        self._servers.append(server)
        return server

    def close(self) -> None:
        """End the DHCP servers; the rest goes with the lab."""
        for server in self._servers:
            server.stop()
        self._servers.clear()

    def guest_port(self, bridge: str, name: str, mac: str) -> str:
        """A namespace in place of a guest: `eth0` on the bridge, without any address."""
        namespace = self.lab.namespace(name)
        ip(
            *("-n", self.lab.host, "link", "add", f"g-{name}", "up", "master", bridge),
            *("type", "veth", "peer", "name", "eth0", "address", mac, "netns", namespace),
        )
        ip("-n", namespace, "link", "set", "eth0", "up")
        return namespace
