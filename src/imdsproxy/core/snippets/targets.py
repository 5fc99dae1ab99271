"""Snippets as QEMU, libvirt, Proxmox VE and Incus take them."""

from __future__ import annotations

import shlex
import textwrap
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from html import escape
from typing import Final, assert_never

from imdsproxy.core.model import Dialect
from imdsproxy.core.snippets import (
    HINTS,
    IMDS_WORDS,
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
)

_WIDTH: Final = 96
_DHCP: Final = "The network's DHCP server must announce it; with dnsmasq (other servers: option 121, static routes):"
_INCUS_MACHINE: Final = "a virtual machine, before its first start."
_DNSMASQ: Final = "http://libvirt.org/schemas/network/dnsmasq/1.0"
_EXTRA_KEY: Final = "io.systemd.stub.kernel-cmdline-extra"
_EXTRA: Final = f"{_EXTRA_KEY}={IMDS_WORDS}"
"""An SMBIOS OEM string (type 11) that systemd-stub adds to the kernel command line of a unified image."""

_IMDS_PLACE: Final = (
    "Only for images with systemd 261 or later whose kernel is a unified image: systemd-imdsd asks as "
    "well. With any other boot loader put what follows kernel-cmdline-extra= on the kernel command line."
)

_ASKS: Final = {
    Dialect.OPENSTACK: "cloud-init takes OpenStack; cloudbase-init and Ignition ask the same documents.",
    Dialect.NOCLOUD: "cloud-init takes NoCloud, from the address in the serial number.",
    Dialect.EC2: "cloud-init takes Ec2, without session tokens.",
}


def _quote(text: str) -> str:
    """For a shell, and as readable as may be: text with single quotes in double ones."""
    if "'" in text and not set(text) & set('"$`\\!'):
        return f'"{text}"'
    return shlex.quote(text)


def _shown_uuid(guest: Guest) -> dict[str, str]:
    """The UUID to show; none where cloud-init would take it for Amazon's."""
    return {} if looks_like_amazon(guest.uuid) else {"uuid": guest.uuid}


def _uuid_note(guest: Guest) -> Iterator[Part]:
    if looks_like_amazon(guest.uuid):
        yield Part(
            "note",
            f"The record's UUID {guest.uuid} is missing on purpose: cloud-init would take the machine "
            "for one of Amazon's.",
        )


def _route_part(nic: Nic, option: str | None, where: str) -> Part:
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


def _dnsmasq_option(nic: Nic) -> str | None:
    """Option 121 in dnsmasq's configuration."""
    if isinstance(nic.route, OnLink):
        return f"dhcp-option=121,{nic.route.classless_routes}"
    return None


def _dnsmasq_route(nic: Nic) -> Part:
    return _route_part(nic, _dnsmasq_option(nic), _DHCP)


def smbios_argument(kind: int, fields: Mapping[str, str]) -> str:
    """What follows QEMU's `-smbios`, not yet quoted for a shell; a comma in a value is doubled (qemu(1))."""
    values = (f"{name}={value.replace(',', ',,')}" for name, value in fields.items())
    return ",".join((f"type={kind}", *values))


def _smbios(kind: int, fields: Mapping[str, str]) -> str:
    return f"-smbios {_quote(smbios_argument(kind, fields))}"


def _qemu_identity(guest: Guest, hints: DetectionHints) -> Iterator[Part]:
    yield Part(
        "SMBIOS",
        f"on QEMU's command line. {_ASKS[hints.dialect]} With -kernel, also put '{hints.kernel}' into -append "
        "where the firmware shows no SMBIOS.",
        _smbios(1, {**hints.system, **_shown_uuid(guest)}),
    )
    yield from _uuid_note(guest)


def _qemu_nic(_guest: Guest, number: int, nic: Nic) -> str:
    net = f"net{number}"
    if nic.bridge is None:
        backend = f"tap,id={net},ifname=TAP,script=no,downscript=no"
    else:
        backend = f"bridge,id={net},br={nic.bridge}"
    mac = "" if nic.mac is None else f",mac={nic.mac}"
    device = f"virtio-net-pci,netdev={net}{mac}"
    return f"-netdev {_quote(backend)} \\\n-device {_quote(device)}"


def _qemu_imds(_guest: Guest) -> Iterator[Part]:
    yield Part("systemd-imdsd", _IMDS_PLACE, _smbios(11, {"value": _EXTRA}))


def _libvirt_identity(guest: Guest, hints: DetectionHints) -> Iterator[Part]:
    imds = _wants_imds(guest)
    lines = ["<sysinfo type='smbios'>", "  <system>"]
    lines += [_entry(value, f" name='{name}'") for name, value in hints.system.items()]
    lines.append("  </system>")
    if imds:
        lines += ["  <oemStrings>", _entry(_EXTRA), "  </oemStrings>"]
    yield Part(
        "SMBIOS",
        f"with virsh edit {guest.name}, into <domain>. {_ASKS[hints.dialect]}"
        + (f" The oemStrings are for systemd-imdsd. {_IMDS_PLACE}" if imds else ""),
        "\n".join([*lines, "</sysinfo>"]),
    )
    yield Part("SMBIOS", "into the <os> that is there already.", "<smbios mode='sysinfo'/>")
    yield from _uuid_note(guest)
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


def _libvirt_route(nic: Nic) -> Part:
    option = _dnsmasq_option(nic)
    return _route_part(
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


def _proxmox_identity(guest: Guest, hints: DetectionHints) -> Iterator[Part]:
    fields = [f"{name}={b64encode(text.encode()).decode()}" for name, text in hints.system.items()]
    fields += [f"uuid={uuid}" for uuid in _shown_uuid(guest).values()]
    yield Part(
        "SMBIOS",
        f"on the Proxmox VE host, VMID being the machine's number. {_ASKS[hints.dialect]} It must have no "
        "cloud-init drive: that would win.",
        f"qm set VMID --smbios1 {_quote(','.join(('base64=1', *fields)))}",
    )
    yield from _uuid_note(guest)


def _proxmox_nic(_guest: Guest, number: int, nic: Nic) -> str:
    model = "virtio" if nic.mac is None else f"virtio={nic.mac.upper()}"
    device = f"{model},bridge={nic.bridge or 'BRIDGE'}"
    return f"qm set VMID --net{number} {_quote(device)}"


def _proxmox_imds(_guest: Guest) -> Iterator[Part]:
    oem = _smbios(11, {"value": _EXTRA})
    yield Part("systemd-imdsd", _IMDS_PLACE, f"qm set VMID --args {_quote(oem)}")


def _incus_identity(guest: Guest, hints: DetectionHints) -> Iterator[Part]:
    configure = f"incus config set {_quote(guest.name)}"
    yield Part(
        "SMBIOS",
        f"{_INCUS_MACHINE} {_ASKS[hints.dialect]} Incus has to permit raw.qemu, and gives the UUID itself.",
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


def _incus_route(nic: Nic) -> Part:
    if nic.bridge is None:
        return _dnsmasq_route(nic)
    routes = nic.route.classless_routes if isinstance(nic.route, OnLink) else None
    return _route_part(
        nic,
        routes and f"incus network set {_quote(nic.bridge)} ipv4.dhcp.routes {routes}",
        "If it is one of Incus' own networks with DHCP, this announces the route; for another its DHCP "
        "server must, by option 121.",
    )


def _incus_imds(guest: Guest) -> Iterator[Part]:
    setting = f"incus config set {_quote(guest.name)} smbios11.{_EXTRA_KEY} {_quote(IMDS_WORDS)}"
    yield Part("systemd-imdsd", f"{_INCUS_MACHINE} {_IMDS_PLACE}", setting)


@dataclass(frozen=True, slots=True)
class _Writer:
    """One hypervisor's syntax.

    Attributes:
        identity: What the guest sees of the machine.
        nic: The lines that plug in the guest's NIC of that number.
        nic_place: Where they go.
        route: The way to 169.254.169.254.
        imds: What systemd-imdsd reads, where it is not part of the identity.
    """

    identity: Callable[[Guest, DetectionHints], Iterator[Part]]
    nic: Callable[[Guest, int, Nic], str]
    nic_place: str = ""
    route: Callable[[Nic], Part] = _dnsmasq_route
    imds: Callable[[Guest], Iterable[Part]] = lambda _: ()


_WRITERS: Final[Mapping[Target, _Writer]] = {
    # Arguments of qemu-system-* (`-smbios` in qemu(1)).
    Target.QEMU: _Writer(_qemu_identity, _qemu_nic, "on QEMU's command line. ", imds=_qemu_imds),
    # Pieces of XML (https://libvirt.org/formatdomain.html#smbios-system-information, formatnetwork.html).
    Target.LIBVIRT: _Writer(
        _libvirt_identity,
        _libvirt_nic,
        "into <devices>, or like this where it is already. ",
        _libvirt_route,
    ),
    # `qm set` (smbios1 in qm.conf(5); its values are base64, and it replaces the whole entry).
    Target.PROXMOX: _Writer(_proxmox_identity, _proxmox_nic, imds=_proxmox_imds),
    # Virtual machines by `raw.qemu`, containers by process 1 (their DMI is the host's, and not looked at).
    Target.INCUS: _Writer(
        _incus_identity, _incus_nic, "both kinds. ", _incus_route, imds=_incus_imds
    ),
}


def _wants_imds(guest: Guest) -> bool:
    """Whether systemd-imdsd would find the documents that it reads: the EC2 ones."""
    return Dialect.EC2 in guest.dialects


def _nic_place(nic: Nic) -> str:
    if nic.mac is None:
        return f"Network {nic.network}: the record has no MAC, so any will do."
    return f"Network {nic.network}: the guest is known by this MAC."


def render_snippet(guest: Guest, target: Target, dialect: Dialect) -> Snippet:
    """Everything that makes `guest` ask for the documents of `dialect`, which its record must have."""
    writer = _WRITERS[target]
    parts = list(writer.identity(guest, HINTS[dialect]))
    for number, nic in enumerate(guest.nics):
        place = f"{writer.nic_place}{_nic_place(nic)}"
        parts.append(Part("network card", place, writer.nic(guest, number, nic)))
    # Two NICs of one network need its route once: the first's.
    networks = {nic.network: nic for nic in reversed(guest.nics)}
    parts += map(writer.route, reversed(networks.values()))
    if _wants_imds(guest):
        parts += writer.imds(guest)
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
