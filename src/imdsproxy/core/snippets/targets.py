"""Snippets as QEMU, libvirt, Proxmox VE and Incus take them."""

from __future__ import annotations

import shlex
import textwrap
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

from imdsproxy.core import snippets
from imdsproxy.core.model import Dialect, Instance, IpAddress, Network, NetworkId, Port
from imdsproxy.core.snippets import PLACES, DetectionHints, Target

_WIDTH: Final = 96
_EXTRA_KEY: Final = "io.systemd.stub.kernel-cmdline-extra"
_EXTRA: Final = f"{_EXTRA_KEY}={snippets.IMDS_WORDS}"
"""An SMBIOS OEM string (type 11) that systemd-stub adds to the kernel command line of a unified image."""

_Routes: TypeAlias = dict[NetworkId, snippets.Route]


@dataclass(frozen=True, slots=True)
class Part:
    """Lines that belong to one place.

    Attributes:
        kind: `SMBIOS`, `container`, `network card`, `route`, `systemd-imdsd`, or `note` (which has no text).
        place: Where they go, a line or more.
        text: The lines as they are to be pasted; empty when there is nothing to do.
    """

    kind: str
    place: str
    text: str = ""


def _quote(text: str) -> str:
    """For a shell, and as readable as may be: text with single quotes in double ones."""
    if "'" in text and not set(text) & set('"$`\\!'):
        return f'"{text}"'
    return shlex.quote(text)


def _smbios(kind: int, fields: Mapping[str, str]) -> str:
    """QEMU's option (qemu(1)); no value may hold a comma."""
    values = (f"{name}={value}" for name, value in fields.items())
    return f"-smbios {_quote(','.join((f'type={kind}', *values)))}"


def _shown_uuid(instance: Instance) -> dict[str, str]:
    """The UUID to show; none where cloud-init would take it for Amazon's."""
    return {} if snippets.looks_like_amazon(instance.uuid) else {"uuid": instance.uuid}


def _wants_imds(instance: Instance) -> bool:
    """Whether systemd-imdsd would find the documents that it reads: the EC2 ones."""
    return Dialect.EC2 in snippets.dialects_of(instance)


def _missing_uuid(instance: Instance) -> Iterator[Part]:
    if not _shown_uuid(instance):
        note = f"The record's UUID {instance.uuid} is missing on purpose: cloud-init would take the machine for one of"
        yield Part("note", f"{note} Amazon's.")


def _card(place: str, port: Port, text: str) -> Part:
    known = "the guest is known by this MAC."
    if port.mac is None:
        known = "the record has no MAC, so any will do."
    return Part("network card", f"{place}Network {port.network}: {known}", text)


def _routes(
    routes: _Routes, place: str = PLACES["route"], announce: str = "dhcp-option=121,{routes}"
) -> Iterator[Part]:
    """How the guests of each network reach 169.254.169.254.

    Args:
        routes: By network.
        place: How the hypervisor announces a route, for people.
        announce: The same as it is to be pasted, with `{device}` and `{routes}`.
    """
    for network, route in reversed(routes.items()):
        text = announce.format(device=_quote(route.device or ""), routes=route.announced)
        advice = route.advice.replace("{announce}", place)
        yield Part("route", f"Network {network}: {advice}", text if route.announced else "")


def _imds(instance: Instance, text: str, place: str = PLACES["imds"]) -> Iterator[Part]:
    if _wants_imds(instance):
        yield Part("systemd-imdsd", place, text)


def _qemu(instance: Instance, hints: DetectionHints, routes: _Routes) -> Iterator[Part]:
    """Arguments of qemu-system-* (`-smbios` in qemu(1))."""
    places = PLACES["qemu"]
    smbios = _smbios(1, {**hints.system, **_shown_uuid(instance)})
    yield Part("SMBIOS", places["smbios"].format(hints=hints), smbios)
    yield from _missing_uuid(instance)
    for number, port in enumerate(instance.ports):
        backend = f"bridge,id=net{number},br={routes[port.network].device}"
        if routes[port.network].device is None:
            backend = f"tap,id=net{number},ifname=TAP,script=no,downscript=no"
        card = f"virtio-net-pci,netdev=net{number}{f',mac={port.mac}' if port.mac else ''}"
        text = f"-netdev {_quote(backend)} \\\n-device {_quote(card)}"
        yield _card(places["card"], port, text)
    yield from _routes(routes)
    yield from _imds(instance, _smbios(11, {"value": _EXTRA}))


def _libvirt(instance: Instance, hints: DetectionHints, routes: _Routes) -> Iterator[Part]:
    """Pieces of XML (https://libvirt.org/formatdomain.html#smbios-system-information, formatnetwork.html)."""
    places, strings = PLACES["libvirt"], ""
    place = places["smbios"].format(name=instance.name, hints=hints)
    if _wants_imds(instance):
        place = f"{place} {places['imds']} {PLACES['imds']}"
        strings = f"  <oemStrings>\n    <entry>{_EXTRA}</entry>\n  </oemStrings>\n"
    system = "".join(
        f"    <entry name='{name}'>{value}</entry>\n" for name, value in hints.system.items()
    )
    sysinfo = f"<sysinfo type='smbios'>\n  <system>\n{system}  </system>\n{strings}</sysinfo>"
    yield Part("SMBIOS", place, sysinfo)
    yield Part("SMBIOS", places["os"], "<smbios mode='sysinfo'/>")
    for uuid in _shown_uuid(instance).values():
        yield Part("SMBIOS", places["uuid"], f"<uuid>{uuid}</uuid>")
    yield from _missing_uuid(instance)
    for port in instance.ports:
        device = routes[port.network].device
        text = f"<interface type='{'bridge' if device else 'ethernet'}'>\n"
        text += f"  <mac address='{port.mac}'/>\n" if port.mac else ""
        text += f"  <source bridge='{device}'/>\n" if device else ""
        text += "  <model type='virtio'/>\n</interface>"
        yield _card(places["card"], port, text)
    yield from _routes(
        routes,
        places["route"],
        "<dnsmasq:options xmlns:dnsmasq='http://libvirt.org/schemas/network/dnsmasq/1.0'>\n"
        "  <dnsmasq:option value='dhcp-option=121,{routes}'/>\n"
        "</dnsmasq:options>",
    )


def _proxmox(instance: Instance, hints: DetectionHints, routes: _Routes) -> Iterator[Part]:
    """`qm set` (smbios1 in qm.conf(5); its values are base64, and it replaces the whole entry)."""
    fields = [f"{name}={b64encode(text.encode()).decode()}" for name, text in hints.system.items()]
    fields += [f"uuid={uuid}" for uuid in _shown_uuid(instance).values()]
    smbios = f"qm set VMID --smbios1 {_quote(','.join(('base64=1', *fields)))}"
    yield Part("SMBIOS", PLACES["proxmox"]["smbios"].format(hints=hints), smbios)
    yield from _missing_uuid(instance)
    for number, port in enumerate(instance.ports):
        model = f"virtio={port.mac.upper()}" if port.mac else "virtio"
        card = f"{model},bridge={routes[port.network].device or 'BRIDGE'}"
        yield _card("", port, f"qm set VMID --net{number} {_quote(card)}")
    yield from _routes(routes)
    yield from _imds(instance, f"qm set VMID --args {_quote(_smbios(11, {'value': _EXTRA}))}")


def _incus(instance: Instance, hints: DetectionHints, routes: _Routes) -> Iterator[Part]:
    """Virtual machines by `raw.qemu`, containers by process 1 (their DMI is the host's, and not looked at)."""
    places, name = PLACES["incus"], _quote(instance.name)
    smbios = f"incus config set {name} raw.qemu {_quote(_smbios(1, hints.system))}"
    yield Part("SMBIOS", places["smbios"].format(hints=hints), smbios)
    place, settings = places["init"], {"raw.lxc": f"lxc.init.cmd = /sbin/init {hints.kernel}"}
    if hints.environment:
        settings = {f"environment.{key}": one for key, one in hints.environment.items()}
        place = places["environment"]
    lines = [f"incus config set {name} {key} {_quote(value)}" for key, value in settings.items()]
    yield Part("container", place, "\n".join(lines))
    for number, port in enumerate(instance.ports):
        parent = _quote(routes[port.network].device or "BRIDGE")
        text = f"incus config device add {name} eth{number} nic nictype=bridged parent={parent}"
        yield _card(places["card"], port, text + (f" hwaddr={port.mac}" if port.mac else ""))
    announce = "incus network set {device} ipv4.dhcp.routes {routes}"
    yield from _routes(routes, places["route"], announce)
    text = f"incus config set {name} smbios11.{_EXTRA_KEY} {_quote(snippets.IMDS_WORDS)}"
    yield from _imds(instance, text, f"{places['imds']} {PLACES['imds']}")


_WRITERS: Final = {
    Target.QEMU: _qemu,
    Target.LIBVIRT: _libvirt,
    Target.PROXMOX: _proxmox,
    Target.INCUS: _incus,
}


def render_snippet(
    instance: Instance,
    networks: Mapping[NetworkId, Network],
    target: Target,
    dialect: Dialect,
    host_has: Callable[[IpAddress], bool],
) -> list[Part]:
    """Everything that makes the guest ask for the documents of `dialect`, which its record must have.

    Args:
        instance: Its name is taken for what the hypervisor calls the guest. cloud-init compares its UUID with SMBIOS,
            and then does not ask again at each boot.
        networks: Those of its ports.
        target: The hypervisor.
        dialect: See `choose_dialect`.
        host_has: Whether an address is one of the host's own.
    """
    routes = {
        port.network: snippets.plan_route(networks[port.network], host_has)
        for port in reversed(instance.ports)
    }
    return list(_WRITERS[target](instance, snippets.HINTS[dialect], routes))


def render_text(target: Target, parts: Iterable[Part]) -> str:
    """The snippet for people: each part under a comment that says where it goes."""
    blocks = []
    for part in parts:
        comment = _comment(f"{part.kind}: {part.place}", xml=target is Target.LIBVIRT)
        blocks.append(f"{comment}\n{part.text}" if part.text else comment)
    return "\n\n".join(blocks) + "\n"


def _comment(text: str, *, xml: bool) -> str:
    lines = textwrap.wrap(text, _WIDTH, break_long_words=False, break_on_hyphens=False)
    if not xml:
        return "\n".join(f"# {line}" for line in lines)
    # Two hyphens end an XML comment's right to be one.
    safe = [line.replace("--", "- -") for line in lines]
    return "<!-- " + "\n     ".join(safe) + " -->"
