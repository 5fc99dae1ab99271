"""What the targets say alike: notes, the network card's place, the route, systemd-imdsd."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Final, assert_never

from imdsproxy.core.model import Dialect
from imdsproxy.core.snippets.gate import Gate, looks_like_amazon, plan_imds
from imdsproxy.core.snippets.model import Guest, Nic, Part
from imdsproxy.core.snippets.route import NoRoute, OnLink, SomebodyElses

CMDLINE_EXTRA: Final = f"io.systemd.stub.kernel-cmdline-extra={plan_imds()}"
"""An SMBIOS OEM string (type 11) that systemd-stub adds to the kernel command line of a unified image."""

IMDS_PLACE: Final = (
    "Only for images with systemd 261 or later whose kernel is a unified image: systemd-imdsd asks as "
    "well. With any other boot loader put what follows kernel-cmdline-extra= on the kernel command line."
)

_ASKS: Final = {
    Dialect.OPENSTACK: "cloud-init takes OpenStack; cloudbase-init and Ignition ask the same documents.",
    Dialect.NOCLOUD: "cloud-init takes NoCloud, from the address in the serial number.",
    Dialect.EC2: "cloud-init takes Ec2, without session tokens.",
}


def quote(text: str) -> str:
    """For a shell, and as readable as may be: text with single quotes in double ones."""
    if "'" in text and not set(text) & set('"$`\\!'):
        return f'"{text}"'
    return shlex.quote(text)


def asking(gate: Gate) -> str:
    """Who asks what with the gate open."""
    return _ASKS[gate.dialect]


def smbios_uuid(guest: Guest) -> str | None:
    """The UUID to show; `None` where cloud-init would take it for Amazon's."""
    return None if looks_like_amazon(guest.uuid) else guest.uuid


def uuid_note(guest: Guest) -> Iterator[Part]:
    """A warning where the record's UUID must not be shown."""
    if looks_like_amazon(guest.uuid):
        yield Part(
            "note",
            f"The record's UUID {guest.uuid} is left out on purpose: cloud-init would take the machine "
            "for one of Amazon's.",
        )


def card(nic: Nic) -> str:
    """A note on the network card: by what the guest is known."""
    if nic.mac is None:
        return f"Network {nic.network}: the record has no MAC, so any will do."
    return f"Network {nic.network}: the guest is known by this MAC."


def each_network(guest: Guest) -> list[Nic]:
    """A card for each network: two of one network need its route once."""
    return list({nic.network: nic for nic in reversed(guest.nics)}.values())[::-1]


def wants_imds(guest: Guest) -> bool:
    """Whether systemd-imdsd would find what it is told of: it reads the EC2 documents."""
    return Dialect.EC2 in guest.dialects


def route_part(nic: Nic, option: str | None, where: str) -> Part:
    """The way to 169.254.169.254.

    Args:
        nic: Whose network it is.
        option: The lines that announce the route, in the target's words.
        where: The place where they go.
    """
    match nic.route:
        case NoRoute(device):
            return Part(
                "route",
                f"Network {nic.network}: no route is needed; what guests send to their gateway for "
                f"169.254.169.254 is answered on {device}.",
            )
        case OnLink(device=device, gateway_unknown=unknown, any_gateway=any_gateway):
            text = (
                f"Network {nic.network}: no gateway leads there, {device} itself answers. {where}"
            )
            if unknown:
                which = (
                    "guests have a gateway" if any_gateway else "the guests' gateway is this host"
                )
                text = (
                    f"Network {nic.network}: nothing, if {which}; its record names "
                    f"no subnet. Else {device} itself answers. {where} If guests have a gateway, add "
                    "0.0.0.0/0,GATEWAY: with option 121 they look at no other."
                )
            return Part("route", text, option or "")
        case SomebodyElses(namespace):
            return Part(
                "route",
                f"Network {nic.network}: whoever made the namespace {namespace} leads guests to "
                "169.254.169.254 (Neutron's DHCP server announces the route).",
            )
    assert_never(nic.route)


def dnsmasq_option(nic: Nic) -> str | None:
    """Option 121 in dnsmasq's configuration."""
    if isinstance(nic.route, OnLink):
        return f"dhcp-option=121,{nic.route.classless_routes}"
    return None
