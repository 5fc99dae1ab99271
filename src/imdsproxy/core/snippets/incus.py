"""Incus: virtual machines by `raw.qemu`, containers by process 1 (their DMI is the host's, and not looked at)."""

from __future__ import annotations

from typing import Final

from imdsproxy.core.snippets.gate import Gate
from imdsproxy.core.snippets.model import Guest, Nic, Part
from imdsproxy.core.snippets.qemu import DHCP_PLACE, smbios_argument
from imdsproxy.core.snippets.route import OnLink
from imdsproxy.core.snippets.words import (
    CMDLINE_EXTRA,
    IMDS_PLACE,
    asking,
    card,
    dnsmasq_option,
    each_network,
    quote,
    route_part,
    wants_imds,
)

_MACHINE: Final = "a virtual machine, before its first start."
_CONTAINER: Final = "before its first start."
_ROUTE_PLACE: Final = (
    "If it is one of Incus' own networks with DHCP, this announces the route; for another its DHCP "
    "server must, by option 121."
)


def incus_parts(guest: Guest, gate: Gate) -> tuple[Part, ...]:
    """Commands of the `incus` client."""
    name = quote(guest.name)
    argument = f"-smbios {quote(smbios_argument(1, gate.system))}"
    parts = [
        Part(
            "SMBIOS",
            f"{_MACHINE} {asking(gate)} Incus has to permit raw.qemu, and gives the UUID itself.",
            f"incus config set {name} raw.qemu {quote(argument)}",
        ),
        _container(name, gate),
    ]
    parts += [
        Part("network card", f"both kinds. {card(nic)}", _card(name, number, nic))
        for number, nic in enumerate(guest.nics)
    ]
    parts += [route_part(nic, _routes(nic), _place(nic)) for nic in each_network(guest)]
    if wants_imds(guest):
        key, _, value = CMDLINE_EXTRA.partition("=")
        setting = f"incus config set {name} smbios11.{key} {quote(value)}"
        parts.append(Part("systemd-imdsd", f"{_MACHINE} {IMDS_PLACE}", setting))
    return tuple(parts)


def _container(name: str, gate: Gate) -> Part:
    if gate.environment:
        lines = [
            f"incus config set {name} environment.{key} {quote(value)}"
            for key, value in gate.environment.items()
        ]
        note = (
            f"{_CONTAINER} Not with an image that seeds /var/lib/cloud/seed/nocloud-net (those with "
            "/cloud in their name do): cloud-init takes that first."
        )
        return Part("container", note, "\n".join(lines))
    value = quote(f"lxc.init.cmd = /sbin/init {gate.kernel}")
    return Part(
        "container",
        f"{_CONTAINER} cloud-init reads process 1's command line in place of the kernel's.",
        f"incus config set {name} raw.lxc {value}",
    )


def _card(name: str, number: int, nic: Nic) -> str:
    device = [f"incus config device add {name} eth{number} nic nictype=bridged"]
    device.append(f"parent={quote(nic.bridge or 'BRIDGE')}")
    if nic.mac is not None:
        device.append(f"hwaddr={nic.mac}")
    return " ".join(device)


def _place(nic: Nic) -> str:
    return _ROUTE_PLACE if nic.bridge is not None else DHCP_PLACE


def _routes(nic: Nic) -> str | None:
    if isinstance(nic.route, OnLink) and nic.bridge is not None:
        routes = nic.route.classless_routes
        return f"incus network set {quote(nic.bridge)} ipv4.dhcp.routes {routes}"
    return dnsmasq_option(nic)
