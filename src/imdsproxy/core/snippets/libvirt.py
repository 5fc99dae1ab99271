"""libvirt's XML (https://libvirt.org/formatdomain.html#smbios-system-information, formatnetwork.html)."""

from __future__ import annotations

from html import escape
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
    route_part,
    uuid_note,
    wants_imds,
)

_NETWORK_PLACE: Final = (
    "If libvirt serves DHCP there: with virsh net-edit, into <network>; then net-destroy and net-start. "
    "Any other DHCP server: option 121, static routes, with the same values."
)
_DNSMASQ: Final = "http://libvirt.org/schemas/network/dnsmasq/1.0"


def libvirt_parts(guest: Guest, gate: Gate) -> tuple[Part, ...]:
    """Pieces of a domain's XML, and of its network's."""
    imds = wants_imds(guest)
    parts = [
        Part(
            "SMBIOS",
            f"with virsh edit {guest.name}, into <domain>. {asking(gate)}"
            + (f" The oemStrings are for systemd-imdsd. {IMDS_PLACE}" if imds else ""),
            _sysinfo(gate, imds=imds),
        ),
        Part("SMBIOS", "into the <os> that is there already.", "<smbios mode='sysinfo'/>"),
        *_uuid(guest),
    ]
    parts += [
        Part(
            "network card",
            f"into <devices>, or like this where it is already. {card(nic)}",
            _card(nic),
        )
        for nic in guest.nics
    ]
    parts += [route_part(nic, _options(nic), _NETWORK_PLACE) for nic in each_network(guest)]
    return tuple(parts)


def _uuid(guest: Guest) -> list[Part]:
    noted = list(uuid_note(guest))
    if noted:
        return noted
    return [
        Part(
            "SMBIOS",
            "only for a domain that is yet to be defined (the UUID of one that is cannot be changed): into "
            "<domain>. cloud-init then sees at each boot that it is the same instance.",
            f"<uuid>{guest.uuid}</uuid>",
        )
    ]


def _sysinfo(gate: Gate, *, imds: bool) -> str:
    entries = [
        f"    <entry name='{name}'>{escape(value, quote=False)}</entry>"
        for name, value in gate.system.items()
    ]
    lines = ["<sysinfo type='smbios'>", "  <system>", *entries, "  </system>"]
    if imds:
        text = escape(CMDLINE_EXTRA, quote=False)
        lines += ["  <oemStrings>", f"    <entry>{text}</entry>", "  </oemStrings>"]
    return "\n".join([*lines, "</sysinfo>"])


def _card(nic: Nic) -> str:
    kind, source = ("ethernet", "") if nic.bridge is None else ("bridge", nic.bridge)
    lines = [f"<interface type='{kind}'>"]
    if nic.mac is not None:
        lines.append(f"  <mac address='{nic.mac}'/>")
    if source:
        lines.append(f"  <source bridge='{escape(source)}'/>")
    return "\n".join([*lines, "  <model type='virtio'/>", "</interface>"])


def _options(nic: Nic) -> str | None:
    option = dnsmasq_option(nic)
    if option is None:
        return None
    return (
        f"<dnsmasq:options xmlns:dnsmasq='{_DNSMASQ}'>\n"
        f"  <dnsmasq:option value='{option}'/>\n"
        "</dnsmasq:options>"
    )
