"""Snippets as QEMU, libvirt, Proxmox VE and Incus take them."""

from __future__ import annotations

import shlex
import textwrap
from abc import ABC, abstractmethod
from base64 import b64encode
from collections.abc import Iterator, Mapping
from html import escape
from typing import Final, assert_never

from imdsproxy.core.model import Dialect
from imdsproxy.core.snippets.plan import (
    DetectionHints,
    ForeignNamespace,
    Guest,
    Nic,
    NoRoute,
    OnLink,
    Part,
    Snippet,
    Target,
    looks_like_amazon,
    plan_hints,
    plan_imds,
)

_WIDTH: Final = 96
_DHCP: Final = "The network's DHCP server must announce it; with dnsmasq (other servers: option 121, static routes):"
_DNSMASQ: Final = "http://libvirt.org/schemas/network/dnsmasq/1.0"
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


def asking(hints: DetectionHints) -> str:
    """The clients that ask when they see the hints."""
    return _ASKS[hints.dialect]


def smbios_uuid(guest: Guest) -> str | None:
    """The UUID to show; `None` where cloud-init would take it for Amazon's."""
    return None if looks_like_amazon(guest.uuid) else guest.uuid


def uuid_note(guest: Guest) -> Iterator[Part]:
    """A warning where the record's UUID must not be shown."""
    if looks_like_amazon(guest.uuid):
        yield Part(
            "note",
            f"The record's UUID {guest.uuid} is missing on purpose: cloud-init would take the machine "
            "for one of Amazon's.",
        )


def nic_note(nic: Nic) -> str:
    """How the guest is known by its NIC."""
    if nic.mac is None:
        return f"Network {nic.network}: the record has no MAC, so any will do."
    return f"Network {nic.network}: the guest is known by this MAC."


def each_network(guest: Guest) -> list[Nic]:
    """One NIC of each network: two of one network need its route once."""
    return list({nic.network: nic for nic in reversed(guest.nics)}.values())[::-1]


def wants_imds(guest: Guest) -> bool:
    """Whether systemd-imdsd would find the documents that it reads: the EC2 ones."""
    return Dialect.EC2 in guest.dialects


def route_part(nic: Nic, option: str | None, where: str) -> Part:
    """The way to 169.254.169.254.

    Args:
        nic: Whose network it is.
        option: The lines that announce the route, as the target writes them.
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
                    "0.0.0.0/0,GATEWAY: clients that receive option 121 ignore the other one."
                )
            return Part("route", text, option or "")
        case ForeignNamespace(namespace):
            return Part(
                "route",
                f"Network {nic.network}: the owner of the namespace {namespace} leads guests to "
                "169.254.169.254 (Neutron's DHCP server announces the route).",
            )
    assert_never(nic.route)


def dnsmasq_option(nic: Nic) -> str | None:
    """Option 121 in dnsmasq's configuration."""
    if isinstance(nic.route, OnLink):
        return f"dhcp-option=121,{nic.route.classless_routes}"
    return None


def smbios_argument(kind: int, fields: Mapping[str, str]) -> str:
    """What follows QEMU's `-smbios`, not yet quoted for a shell; a comma in a value is doubled (qemu(1))."""
    values = (f"{name}={value.replace(',', ',,')}" for name, value in fields.items())
    return ",".join((f"type={kind}", *values))


class _Writer(ABC):
    """One hypervisor's syntax; what most have in common."""

    nic_place = ""
    """Where a NIC's lines go."""

    def parts(self, guest: Guest, hints: DetectionHints) -> Iterator[Part]:
        """All of them, in the order in which they are pasted."""
        yield from self.identity(guest, hints)
        for number, nic in enumerate(guest.nics):
            place = f"{self.nic_place}{nic_note(nic)}"
            yield Part("network card", place, self.nic(guest, number, nic))
        for nic in each_network(guest):
            yield self.route(nic)
        if wants_imds(guest):
            yield from self.imds(guest)

    @abstractmethod
    def identity(self, guest: Guest, hints: DetectionHints) -> Iterator[Part]:
        """What the guest sees of the machine."""

    @abstractmethod
    def nic(self, guest: Guest, number: int, nic: Nic) -> str:
        """The lines that plug in a NIC."""

    def route(self, nic: Nic) -> Part:
        """The way to 169.254.169.254."""
        return route_part(nic, dnsmasq_option(nic), _DHCP)

    def imds(self, guest: Guest) -> Iterator[Part]:
        """What systemd-imdsd reads, where it is not part of the identity."""
        del guest
        yield from ()


class _Qemu(_Writer):
    """Arguments of qemu-system-* (`-smbios` in qemu(1))."""

    nic_place = "on QEMU's command line. "

    def identity(self, guest: Guest, hints: DetectionHints) -> Iterator[Part]:
        uuid = smbios_uuid(guest)
        system = {**hints.system, **({} if uuid is None else {"uuid": uuid})}
        yield Part(
            "SMBIOS",
            f"on QEMU's command line. {asking(hints)} With -kernel, also put '{hints.kernel}' into -append "
            "where the firmware shows no SMBIOS.",
            f"-smbios {quote(smbios_argument(1, system))}",
        )
        yield from uuid_note(guest)

    def nic(self, guest: Guest, number: int, nic: Nic) -> str:
        del guest
        net = f"net{number}"
        if nic.bridge is None:
            backend = f"tap,id={net},ifname=TAP,script=no,downscript=no"
        else:
            backend = f"bridge,id={net},br={nic.bridge}"
        mac = "" if nic.mac is None else f",mac={nic.mac}"
        device = f"virtio-net-pci,netdev={net}{mac}"
        return f"-netdev {quote(backend)} \\\n-device {quote(device)}"

    def imds(self, guest: Guest) -> Iterator[Part]:
        del guest
        value = smbios_argument(11, {"value": CMDLINE_EXTRA})
        yield Part("systemd-imdsd", IMDS_PLACE, f"-smbios {quote(value)}")


class _Libvirt(_Writer):
    """Pieces of XML (https://libvirt.org/formatdomain.html#smbios-system-information, formatnetwork.html)."""

    nic_place = "into <devices>, or like this where it is already. "

    def identity(self, guest: Guest, hints: DetectionHints) -> Iterator[Part]:
        imds = wants_imds(guest)
        lines = ["<sysinfo type='smbios'>", "  <system>"]
        lines += [_entry(value, f" name='{name}'") for name, value in hints.system.items()]
        lines.append("  </system>")
        if imds:
            lines += ["  <oemStrings>", _entry(CMDLINE_EXTRA), "  </oemStrings>"]
        yield Part(
            "SMBIOS",
            f"with virsh edit {guest.name}, into <domain>. {asking(hints)}"
            + (f" The oemStrings are for systemd-imdsd. {IMDS_PLACE}" if imds else ""),
            "\n".join([*lines, "</sysinfo>"]),
        )
        yield Part("SMBIOS", "into the <os> that is there already.", "<smbios mode='sysinfo'/>")
        if smbios_uuid(guest) is None:
            yield from uuid_note(guest)
            return
        yield Part(
            "SMBIOS",
            "only for a domain that is yet to be defined (the UUID of one that is cannot be changed): into "
            "<domain>. cloud-init then sees at each boot that it is the same instance.",
            f"<uuid>{guest.uuid}</uuid>",
        )

    def nic(self, guest: Guest, number: int, nic: Nic) -> str:
        del guest, number
        lines = [f"<interface type='{'ethernet' if nic.bridge is None else 'bridge'}'>"]
        if nic.mac is not None:
            lines.append(f"  <mac address='{nic.mac}'/>")
        if nic.bridge is not None:
            lines.append(f"  <source bridge='{escape(nic.bridge)}'/>")
        return "\n".join([*lines, "  <model type='virtio'/>", "</interface>"])

    def route(self, nic: Nic) -> Part:
        option = dnsmasq_option(nic)
        return route_part(
            nic,
            option
            and f"<dnsmasq:options xmlns:dnsmasq='{_DNSMASQ}'>\n"
            f"  <dnsmasq:option value='{option}'/>\n"
            "</dnsmasq:options>",
            "If libvirt serves DHCP there: with virsh net-edit, into <network>; then net-destroy and net-start. "
            "Any other DHCP server: option 121, static routes, with the same values.",
        )


def _entry(value: str, attribute: str = "") -> str:
    return f"    <entry{attribute}>{escape(value, quote=False)}</entry>"


class _Proxmox(_Writer):
    """`qm set` (smbios1 in qm.conf(5); its values are base64, and it replaces the whole entry)."""

    def identity(self, guest: Guest, hints: DetectionHints) -> Iterator[Part]:
        fields = [
            f"{name}={b64encode(text.encode()).decode()}" for name, text in hints.system.items()
        ]
        uuid = smbios_uuid(guest)
        smbios1 = ",".join(("base64=1", *fields, *([] if uuid is None else [f"uuid={uuid}"])))
        yield Part(
            "SMBIOS",
            f"on the Proxmox VE host, VMID being the machine's number. {asking(hints)} It must have no "
            "cloud-init drive: that would win.",
            f"qm set VMID --smbios1 {quote(smbios1)}",
        )
        yield from uuid_note(guest)

    def nic(self, guest: Guest, number: int, nic: Nic) -> str:
        del guest
        model = "virtio" if nic.mac is None else f"virtio={nic.mac.upper()}"
        device = f"{model},bridge={nic.bridge or 'BRIDGE'}"
        return f"qm set VMID --net{number} {quote(device)}"

    def imds(self, guest: Guest) -> Iterator[Part]:
        del guest
        oem = f"-smbios {quote(smbios_argument(11, {'value': CMDLINE_EXTRA}))}"
        yield Part("systemd-imdsd", IMDS_PLACE, f"qm set VMID --args {quote(oem)}")


class _Incus(_Writer):
    """Virtual machines by `raw.qemu`, containers by process 1 (their DMI is the host's, and not looked at)."""

    machine = "a virtual machine, before its first start."
    nic_place = "both kinds. "

    def identity(self, guest: Guest, hints: DetectionHints) -> Iterator[Part]:
        argument = f"-smbios {quote(smbios_argument(1, hints.system))}"
        yield Part(
            "SMBIOS",
            f"{self.machine} {asking(hints)} Incus has to permit raw.qemu, and gives the UUID itself.",
            f"incus config set {quote(guest.name)} raw.qemu {quote(argument)}",
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
        lines = [
            f"incus config set {quote(guest.name)} {key} {quote(value)}"
            for key, value in settings.items()
        ]
        yield Part("container", f"before its first start. {note}", "\n".join(lines))

    def nic(self, guest: Guest, number: int, nic: Nic) -> str:
        device = f"incus config device add {quote(guest.name)} eth{number} nic nictype=bridged"
        mac = "" if nic.mac is None else f" hwaddr={nic.mac}"
        return f"{device} parent={quote(nic.bridge or 'BRIDGE')}{mac}"

    def route(self, nic: Nic) -> Part:
        if nic.bridge is None:
            return super().route(nic)
        routes = nic.route.classless_routes if isinstance(nic.route, OnLink) else None
        return route_part(
            nic,
            routes and f"incus network set {quote(nic.bridge)} ipv4.dhcp.routes {routes}",
            "If it is one of Incus' own networks with DHCP, this announces the route; for another its DHCP "
            "server must, by option 121.",
        )

    def imds(self, guest: Guest) -> Iterator[Part]:
        key, _, value = CMDLINE_EXTRA.partition("=")
        setting = f"incus config set {quote(guest.name)} smbios11.{key} {quote(value)}"
        yield Part("systemd-imdsd", f"{self.machine} {IMDS_PLACE}", setting)


_WRITERS: Final[Mapping[Target, _Writer]] = {
    Target.QEMU: _Qemu(),
    Target.LIBVIRT: _Libvirt(),
    Target.PROXMOX: _Proxmox(),
    Target.INCUS: _Incus(),
}


def render_snippet(guest: Guest, target: Target, dialect: Dialect) -> Snippet:
    """Everything that makes `guest` ask for the documents of `dialect`, which its record must have."""
    return Snippet(target, dialect, tuple(_WRITERS[target].parts(guest, plan_hints(dialect))))


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
