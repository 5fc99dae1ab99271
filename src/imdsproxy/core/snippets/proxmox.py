"""Proxmox VE: `qm set` (smbios1 in qm.conf(5); its values are base64, and it replaces the whole entry)."""

from __future__ import annotations

from base64 import b64encode

from imdsproxy.core.snippets.gate import Gate
from imdsproxy.core.snippets.model import Guest, Nic, Part
from imdsproxy.core.snippets.qemu import DHCP_PLACE, smbios_argument
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


def proxmox_parts(guest: Guest, gate: Gate) -> tuple[Part, ...]:
    """Commands for a Proxmox VE host; VMID is the machine's number."""
    parts = [
        Part(
            "SMBIOS",
            f"on the Proxmox VE host, VMID being the machine's number. {asking(gate)} It must have no "
            "cloud-init drive: that would win.",
            f"qm set VMID --smbios1 {quote(_smbios1(guest, gate))}",
        ),
        *uuid_note(guest),
    ]
    parts += [
        Part("network card", card(nic), f"qm set VMID --net{number} {_card(nic)}")
        for number, nic in enumerate(guest.nics)
    ]
    parts += [route_part(nic, dnsmasq_option(nic), DHCP_PLACE) for nic in each_network(guest)]
    if wants_imds(guest):
        oem = f"-smbios {quote(smbios_argument(11, {'value': CMDLINE_EXTRA}))}"
        parts.append(Part("systemd-imdsd", IMDS_PLACE, f"qm set VMID --args {quote(oem)}"))
    return tuple(parts)


def _smbios1(guest: Guest, gate: Gate) -> str:
    fields = [f"{name}={b64encode(text.encode()).decode()}" for name, text in gate.system.items()]
    uuid = smbios_uuid(guest)
    if uuid is not None:
        fields.append(f"uuid={uuid}")
    return ",".join(("base64=1", *fields))


def _card(nic: Nic) -> str:
    model = "virtio" if nic.mac is None else f"virtio={nic.mac.upper()}"
    return quote(f"{model},bridge={nic.bridge or 'BRIDGE'}")
