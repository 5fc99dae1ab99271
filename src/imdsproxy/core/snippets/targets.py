"""Snippets as QEMU, libvirt, Proxmox VE and Incus take them."""

from __future__ import annotations

import shlex
import textwrap
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from html import escape
from typing import Final

from imdsproxy.core.model import Dialect
from imdsproxy.core.snippets import (
    HINTS,
    IMDS_WORDS,
    DetectionHints,
    Guest,
    Nic,
    Part,
    Snippet,
    Target,
    looks_like_amazon,
)

_WIDTH: Final = 96
_DHCP: Final = "The network's DHCP server must announce it; with dnsmasq (other servers: option 121, static routes):"
_INCUS_MACHINE: Final = "a virtual machine, before its first start."
_EXTRA_KEY: Final = "io.systemd.stub.kernel-cmdline-extra"
_EXTRA: Final = f"{_EXTRA_KEY}={IMDS_WORDS}"
"""An SMBIOS OEM string (type 11) that systemd-stub adds to the kernel command line of a unified image."""

_IMDS_PLACE: Final = (
    "Only for images with systemd 261 or later whose kernel is a unified image: systemd-imdsd asks as "
    "well. With any other boot loader put what follows kernel-cmdline-extra= on the kernel command line."
)


def _quote(text: str) -> str:
    """For a shell, and as readable as may be: text with single quotes in double ones."""
    if "'" in text and not set(text) & set('"$`\\!'):
        return f'"{text}"'
    return shlex.quote(text)


def _shown_uuid(guest: Guest) -> dict[str, str]:
    """The UUID to show; none where cloud-init would take it for Amazon's."""
    return {} if looks_like_amazon(guest.uuid) else {"uuid": guest.uuid}


def smbios_argument(kind: int, fields: Mapping[str, str]) -> str:
    """What follows QEMU's `-smbios`, not yet quoted for a shell; a comma in a value is doubled (qemu(1))."""
    values = (f"{name}={value.replace(',', ',,')}" for name, value in fields.items())
    return ",".join((f"type={kind}", *values))


def _smbios(kind: int, fields: Mapping[str, str]) -> str:
    return f"-smbios {_quote(smbios_argument(kind, fields))}"


def _qemu_identity(guest: Guest, hints: DetectionHints) -> Iterator[Part]:
    yield Part(
        "SMBIOS",
        f"on QEMU's command line. {hints.asks} With -kernel, also put '{hints.kernel}' into -append "
        "where the firmware shows no SMBIOS.",
        _smbios(1, {**hints.system, **_shown_uuid(guest)}),
    )


def _qemu_nic(_guest: Guest, number: int, nic: Nic) -> str:
    net = f"net{number}"
    if nic.bridge is None:
        backend = f"tap,id={net},ifname=TAP,script=no,downscript=no"
    else:
        backend = f"bridge,id={net},br={nic.bridge}"
    mac = "" if nic.mac is None else f",mac={nic.mac}"
    device = f"virtio-net-pci,netdev={net}{mac}"
    return f"-netdev {_quote(backend)} \\\n-device {_quote(device)}"


def _libvirt_identity(guest: Guest, hints: DetectionHints) -> Iterator[Part]:
    imds = _wants_imds(guest)
    lines = ["<sysinfo type='smbios'>", "  <system>"]
    lines += [_entry(value, f" name='{name}'") for name, value in hints.system.items()]
    lines.append("  </system>")
    if imds:
        lines += ["  <oemStrings>", _entry(_EXTRA), "  </oemStrings>"]
    yield Part(
        "SMBIOS",
        f"with virsh edit {guest.name}, into <domain>. {hints.asks}"
        + (f" The oemStrings are for systemd-imdsd. {_IMDS_PLACE}" if imds else ""),
        "\n".join([*lines, "</sysinfo>"]),
    )
    yield Part("SMBIOS", "into the <os> that is there already.", "<smbios mode='sysinfo'/>")
    for uuid in _shown_uuid(guest).values():
        yield Part(
            "SMBIOS",
            "only for a domain that is yet to be defined (the UUID of one that is cannot be changed): into "
            "<domain>. cloud-init then sees at each boot that it is the same instance.",
            f"<uuid>{uuid}</uuid>",
        )


def _libvirt_nic(_guest: Guest, _number: int, nic: Nic) -> str:
    lines = [f"<interface type='{'ethernet' if nic.bridge is None else 'bridge'}'>"]
    if nic.mac is not None:
        lines.append(f"  <mac address='{nic.mac}'/>")
    if nic.bridge is not None:
        lines.append(f"  <source bridge='{escape(nic.bridge)}'/>")
    return "\n".join([*lines, "  <model type='virtio'/>", "</interface>"])


def _entry(value: str, attribute: str = "") -> str:
    return f"    <entry{attribute}>{escape(value, quote=False)}</entry>"


def _proxmox_identity(guest: Guest, hints: DetectionHints) -> Iterator[Part]:
    fields = [f"{name}={b64encode(text.encode()).decode()}" for name, text in hints.system.items()]
    fields += [f"uuid={uuid}" for uuid in _shown_uuid(guest).values()]
    yield Part(
        "SMBIOS",
        f"on the Proxmox VE host, VMID being the machine's number. {hints.asks} It must have no "
        "cloud-init drive: that would win.",
        f"qm set VMID --smbios1 {_quote(','.join(('base64=1', *fields)))}",
    )


def _proxmox_nic(_guest: Guest, number: int, nic: Nic) -> str:
    model = "virtio" if nic.mac is None else f"virtio={nic.mac.upper()}"
    device = f"{model},bridge={nic.bridge or 'BRIDGE'}"
    return f"qm set VMID --net{number} {_quote(device)}"


def _incus_identity(guest: Guest, hints: DetectionHints) -> Iterator[Part]:
    configure = f"incus config set {_quote(guest.name)}"
    yield Part(
        "SMBIOS",
        f"{_INCUS_MACHINE} {hints.asks} Incus has to permit raw.qemu, and gives the UUID itself.",
        f"{configure} raw.qemu {_quote(_smbios(1, hints.system))}",
    )
    if hints.environment:
        settings = {f"environment.{key}": one for key, one in hints.environment.items()}
        note = (
            "Not with an image that seeds /var/lib/cloud/seed/nocloud-net (those with "
            "/cloud in their name do): cloud-init takes that first."
        )
    else:
        settings = {"raw.lxc": f"lxc.init.cmd = /sbin/init {hints.kernel}"}
        note = "cloud-init reads process 1's command line in place of the kernel's."
    lines = [f"{configure} {key} {_quote(value)}" for key, value in settings.items()]
    yield Part("container", f"before its first start. {note}", "\n".join(lines))


def _incus_nic(guest: Guest, number: int, nic: Nic) -> str:
    device = f"incus config device add {_quote(guest.name)} eth{number} nic nictype=bridged"
    mac = "" if nic.mac is None else f" hwaddr={nic.mac}"
    return f"{device} parent={_quote(nic.bridge or 'BRIDGE')}{mac}"


@dataclass(frozen=True, slots=True)
class _Writer:
    """One hypervisor's syntax.

    Attributes:
        identity: What the guest sees of the machine.
        nic: The lines that plug in the guest's NIC of that number.
        nic_place: Where they go.
        announce: How a route is announced, with `{bridge}` and `{routes}`.
        announce_place: Where that goes.
        imds: What systemd-imdsd reads, where it is not part of the identity; with `{name}`.
        imds_place: Where that goes.
    """

    identity: Callable[[Guest, DetectionHints], Iterator[Part]]
    nic: Callable[[Guest, int, Nic], str]
    nic_place: str = ""
    announce: str = "dhcp-option=121,{routes}"
    announce_place: str = _DHCP
    imds: str = ""
    imds_place: str = _IMDS_PLACE


_WRITERS: Final[Mapping[Target, _Writer]] = {
    # Arguments of qemu-system-* (`-smbios` in qemu(1)).
    Target.QEMU: _Writer(
        _qemu_identity, _qemu_nic, "on QEMU's command line. ", imds=_smbios(11, {"value": _EXTRA})
    ),
    # Pieces of XML (https://libvirt.org/formatdomain.html#smbios-system-information, formatnetwork.html).
    Target.LIBVIRT: _Writer(
        _libvirt_identity,
        _libvirt_nic,
        "into <devices>, or like this where it is already. ",
        "<dnsmasq:options xmlns:dnsmasq='http://libvirt.org/schemas/network/dnsmasq/1.0'>\n"
        "  <dnsmasq:option value='dhcp-option=121,{routes}'/>\n"
        "</dnsmasq:options>",
        "If libvirt serves DHCP there: with virsh net-edit, into <network>; then net-destroy and net-start. "
        "Any other DHCP server: option 121, static routes, with the same values.",
    ),
    # `qm set` (smbios1 in qm.conf(5); its values are base64, and it replaces the whole entry).
    Target.PROXMOX: _Writer(
        _proxmox_identity,
        _proxmox_nic,
        imds=f"qm set VMID --args {_quote(_smbios(11, {'value': _EXTRA}))}",
    ),
    # Virtual machines by `raw.qemu`, containers by process 1 (their DMI is the host's, and not looked at).
    Target.INCUS: _Writer(
        _incus_identity,
        _incus_nic,
        "both kinds. ",
        "incus network set {bridge} ipv4.dhcp.routes {routes}",
        "If it is one of Incus' own networks with DHCP, this announces the route; for another its DHCP "
        "server must, by option 121.",
        f"incus config set {{name}} smbios11.{_EXTRA_KEY} {_quote(IMDS_WORDS)}",
        f"{_INCUS_MACHINE} {_IMDS_PLACE}",
    ),
}


def _wants_imds(guest: Guest) -> bool:
    """Whether systemd-imdsd would find the documents that it reads: the EC2 ones."""
    return Dialect.EC2 in guest.dialects


def _nic_part(writer: _Writer, guest: Guest, number: int, nic: Nic) -> Part:
    known = (
        "the record has no MAC, so any will do."
        if nic.mac is None
        else "the guest is known by this MAC."
    )
    place = f"{writer.nic_place}Network {nic.network}: {known}"
    return Part("network card", place, writer.nic(guest, number, nic))


def _route_part(writer: _Writer, nic: Nic) -> Part:
    # Incus has no network of its own where there is no bridge.
    writer = (
        _WRITERS[Target.QEMU] if nic.bridge is None and "{bridge}" in writer.announce else writer
    )
    advice = nic.advice.replace("{where}", writer.announce_place)
    text = writer.announce.format(bridge=_quote(nic.bridge or ""), routes=nic.announced)
    return Part("route", f"Network {nic.network}: {advice}", text if nic.announced else "")


def render_snippet(guest: Guest, target: Target, dialect: Dialect) -> Snippet:
    """Everything that makes `guest` ask for the documents of `dialect`, which its record must have."""
    writer = _WRITERS[target]
    parts = list(writer.identity(guest, HINTS[dialect]))
    if target is not Target.INCUS and looks_like_amazon(guest.uuid):
        note = f"The record's UUID {guest.uuid} is missing on purpose: cloud-init would take the machine for one of"
        parts.append(Part("note", f"{note} Amazon's."))
    parts += [_nic_part(writer, guest, number, nic) for number, nic in enumerate(guest.nics)]
    # Two NICs of one network need its route once: the first's.
    networks = {nic.network: nic for nic in reversed(guest.nics)}
    parts += [_route_part(writer, nic) for nic in reversed(networks.values())]
    if writer.imds and _wants_imds(guest):
        imds = writer.imds.format(name=_quote(guest.name))
        parts.append(Part("systemd-imdsd", writer.imds_place, imds))
    return Snippet(target, dialect, tuple(parts))


def render_text(snippet: Snippet) -> str:
    """The snippet for people: each part under a comment that says where it goes."""
    blocks = []
    for part in snippet.parts:
        comment = _comment(f"{part.kind}: {part.place}", xml=snippet.target is Target.LIBVIRT)
        blocks.append(f"{comment}\n{part.text}" if part.text else comment)
    return "\n\n".join(blocks) + "\n"


def _comment(text: str, *, xml: bool) -> str:
    lines = textwrap.wrap(text, _WIDTH, break_long_words=False, break_on_hyphens=False)
    if not xml:
        return "\n".join(f"# {line}" for line in lines)
    # Two hyphens end an XML comment's right to be one.
    safe = [line.replace("--", "- -") for line in lines]
    return "<!-- " + "\n     ".join(safe) + " -->"
