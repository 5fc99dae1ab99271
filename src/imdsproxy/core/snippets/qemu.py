"""QEMU's command line (`-smbios` in qemu(1); a comma in a value is doubled)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from imdsproxy.core.snippets.gate import Gate
from imdsproxy.core.snippets.model import Guest, Nic, Part
from imdsproxy.core.snippets.words import (
    CMDLINE_EXTRA,
    IMDS_PLACE,
    asking,
    card,
    dnsmasq_option,
    each_network,
    quote,
    route_part,
    smbios_uuid,
    uuid_note,
    wants_imds,
)

DHCP_PLACE: Final = "The network's DHCP server must tell it; with dnsmasq (other servers: option 121, static routes):"


def qemu_parts(guest: Guest, gate: Gate) -> tuple[Part, ...]:
    """Arguments of qemu-system-*."""
    system = smbios_system(guest, gate)
    parts = [
        Part(
            "SMBIOS",
            f"on QEMU's command line. {asking(gate)} With -kernel, also put '{gate.kernel}' into -append "
            "where the firmware shows no SMBIOS.",
            f"-smbios {quote(smbios_argument(1, system))}",
        ),
        *uuid_note(guest),
    ]
    parts += [
        Part("network card", f"on QEMU's command line. {card(nic)}", _card(number, nic))
        for number, nic in enumerate(guest.nics)
    ]
    parts += [route_part(nic, dnsmasq_option(nic), DHCP_PLACE) for nic in each_network(guest)]
    if wants_imds(guest):
        value = smbios_argument(11, {"value": CMDLINE_EXTRA})
        parts.append(Part("systemd-imdsd", IMDS_PLACE, f"-smbios {quote(value)}"))
    return tuple(parts)


def smbios_system(guest: Guest, gate: Gate) -> dict[str, str]:
    """Type 1 with the record's UUID, where it may be shown."""
    uuid = smbios_uuid(guest)
    return {**gate.system, **({} if uuid is None else {"uuid": uuid})}


def smbios_argument(kind: int, fields: Mapping[str, str]) -> str:
    """What follows `-smbios`, not yet quoted for a shell."""
    values = (f"{name}={value.replace(',', ',,')}" for name, value in fields.items())
    return ",".join((f"type={kind}", *values))


def _card(number: int, nic: Nic) -> str:
    net = f"net{number}"
    if nic.bridge is None:
        backend = f"tap,id={net},ifname=TAP,script=no,downscript=no"
    else:
        backend = f"bridge,id={net},br={nic.bridge}"
    device = f"virtio-net-pci,netdev={net}"
    if nic.mac is not None:
        device += f",mac={nic.mac}"
    return f"-netdev {quote(backend)} \\\n-device {quote(device)}"
