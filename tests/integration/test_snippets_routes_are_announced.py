"""The route that `imdsproxy snippet` prints for dnsmasq, as dnsmasq then tells it to a guest."""

from __future__ import annotations

import subprocess
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from imdsproxy.core.model import Dialect, InterfaceListener, Network
from imdsproxy.core.snippets import Target
from imdsproxy.core.snippets.targets import render_snippet
from support.dhcp_offer import ask_options, classless_routes
from support.guest import inside
from support.hostlab import HostLab
from support.lab import until
from support.snippet_guests import MAC, guest, network, nic
from support.snippet_text import text_of

pytestmark = pytest.mark.root

_METADATA = IPv4Network("169.254.169.254/32")
_ON_LINK = IPv4Address("0.0.0.0")


def _offered(lab: HostLab, of: Network, directory: Path) -> dict[int, bytes]:
    made = render_snippet(guest(nic(of)), Target.QEMU, Dialect.OPENSTACK)
    configuration = directory / "dnsmasq.conf"
    configuration.write_text(f"{text_of(made, 'route')}\n")
    namespace, plugged = lab.namespace("dhcp"), lab.namespace("guest")
    device = "lan0"
    ends = ("type", "veth", "peer", "name", "eth0", "netns", plugged)
    lab.ip("-n", namespace, "link", "add", device, "up", *ends)
    lab.ip("-n", plugged, "link", "set", "eth0", "up")
    lab.address(namespace, "10.0.0.2/24", device)
    server = subprocess.Popen(
        [
            *("/usr/bin/nsenter", f"--net=/run/netns/{namespace}", "--", "/usr/sbin/dnsmasq"),
            *("--keep-in-foreground", f"--conf-file={configuration}", f"--interface={device}"),
            *("--port=0", "--bind-interfaces", "--dhcp-range=10.0.0.50,10.0.0.60", "--user=root"),
            *(f"--dhcp-leasefile={directory}/leases", f"--pid-file={directory}/pid"),
        ],
        stderr=subprocess.DEVNULL,
    )
    told: list[dict[int, bytes]] = []

    def answered() -> bool:
        options = inside(plugged, lambda: ask_options("eth0", MAC))
        told.extend([] if options is None else [options])
        return bool(told)

    try:
        until(answered, within_s=20, what="an offer")
    finally:
        server.kill()
        server.wait()
    return told[0]


def test_a_guest_with_a_foreign_gateway_is_told_the_neighbour_and_that_gateway(
    lab: HostLab, tmp_path: Path
) -> None:
    options = _offered(lab, network(InterfaceListener("lan0")), tmp_path)

    assert classless_routes(options[121]) == [
        (_METADATA, _ON_LINK),
        (IPv4Network("0.0.0.0/0"), IPv4Address("10.0.0.1")),
    ]


def test_a_guest_of_an_isolated_network_is_told_the_neighbour_alone(
    lab: HostLab, tmp_path: Path
) -> None:
    options = _offered(lab, network(gateway=None), tmp_path)

    assert classless_routes(options[121]) == [(_METADATA, _ON_LINK)]
