"""Hypervisor snippets that make a stock image ask for metadata, and the route to 169.254.169.254.

cloud-init runs `ds-identify` first, and stays off unless the machine looks like a cloud. `ds-identify` checks SMBIOS,
or in containers the environment and the command line of process 1. `snippets.toml` has the values it needs for each
dialect, and `plan_route` plans the route to 169.254.169.254. `render_snippet` writes both for QEMU, libvirt, Proxmox VE
or Incus.
"""

import re
import shlex
import textwrap
import tomllib
from base64 import b64encode
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib.resources import files
from typing import Final, TypeAlias

from imdsproxy.model import entities
from imdsproxy.model.entities import METADATA_IPV4, Dialect, Instance, Network, NetworkId


class Target(StrEnum):
    QEMU = "qemu"
    LIBVIRT = "libvirt"
    PROXMOX = "proxmox"
    INCUS = "incus"


@dataclass(frozen=True, slots=True)
class DetectionHints:
    """Values that a guest must see of itself; `snippets.toml` explains the fields."""

    asks: str
    system: Mapping[str, str]
    kernel: str
    environment: Mapping[str, str]


_WIDTH: Final = 96
_TABLES: Final = tomllib.loads(
    files("imdsproxy.tools.snippets").joinpath("snippets.toml").read_text("utf-8")
)
HINTS: Final = {Dialect(name): DetectionHints(**one) for name, one in _TABLES["hints"].items()}
_PLACES: Final = _TABLES["places"]
"""Places of a snippet's parts: texts for all hypervisors, and by hypervisor."""

_IMDS_WORDS: Final = (
    "systemd.imds=1 systemd.imds.network=unlocked systemd.imds.vendor=imdsproxy "
    f"systemd.imds.data_url=http://{METADATA_IPV4}/latest systemd.imds.address_ipv4={METADATA_IPV4} "
    "systemd.imds.key.hostname=/meta-data/hostname "
    "systemd.imds.key.zone=/meta-data/placement/availability-zone "
    "systemd.imds.key.ssh_key=/meta-data/public-keys/0/openssh-key "
    "systemd.imds.key.userdata=/user-data"
)
"""Kernel command line that tells systemd-imdsd (systemd 261) where the EC2 documents are.

Its hwdb knows neither OpenStack nor a plain KVM guest. Without `unlocked`, systemd-imdsd blocks the address for all
other programs of the guest, cloud-init included. No token is configured: there are none.
"""

_EXTRA_KEY: Final = "io.systemd.stub.kernel-cmdline-extra"
_EXTRA: Final = f"{_EXTRA_KEY}={_IMDS_WORDS}"
"""SMBIOS OEM string (type 11) that systemd-stub adds to the kernel command line of a unified image."""

_AMAZON: Final = re.compile(r"ec2.*|[0-9a-f]*2[0-9a-f]ec", re.IGNORECASE)


def choose_dialect(target: Target, dialects: Collection[Dialect]) -> Dialect | None:
    """Return the best of the record's dialects; `None` if it has none.

    cloud-init, cloudbase-init, Ignition and most other clients ask for OpenStack's. Images for Incus contain a NoCloud
    directory, and guests then try NoCloud first: there only NoCloud's own address helps.
    """
    first = (Dialect.OPENSTACK, Dialect.NOCLOUD)
    order = (*(reversed(first) if target is Target.INCUS else first), Dialect.EC2)
    return next((one for one in order if one in dialects), None)


def looks_like_amazon(uuid: str) -> bool:
    """Return whether cloud-init takes this SMBIOS UUID for one of Amazon's, in either byte order."""
    return _AMAZON.fullmatch(uuid.partition("-")[0]) is not None


@dataclass(frozen=True, slots=True)
class Route:
    """Route of a network's guests to 169.254.169.254.

    Attributes:
        device: Host device to which guests are attached, `None` if the network is a foreign namespace.
        advice: Instruction for people, with `{announce}` in place of the hypervisor's way to announce a route.
        announced: DHCP option 121 in dnsmasq's form, pairs of destination and gateway, 0.0.0.0 for on-link; empty if no
            announcement is needed.
    """

    device: str | None
    advice: str
    announced: str = ""


def plan_route(network: Network, host_has: Callable[[entities.IpAddress], bool]) -> Route:
    """Plan the route of a network's guests to 169.254.169.254.

    `network`: record of the network; the gateway of its first IPv4 subnet counts.
    """
    subnet = next(
        (one for one in network.subnets if one.cidr.version == METADATA_IPV4.version), None
    )
    via = None if subnet is None else subnet.gateway
    match network.listener:
        case entities.NamespaceListener(namespace):
            advice = (
                f"the owner of the namespace {namespace} provides the guests' route to {METADATA_IPV4} (Neutron's DHCP "
                "server announces it)."
            )
            return Route(None, advice)
        case entities.BridgeListener(device):
            # `network.listeners.rules` redirects guests' packets to the gateway, whichever host has it.
            answered, unless = via is not None, "guests have a gateway"
        case entities.InterfaceListener(device):
            answered, unless = via is not None and host_has(via), "the guests' gateway is this host"
    if answered:
        advice = f"no route is needed: {device} answers packets for {METADATA_IPV4} that guests send to their gateway."
        return Route(device, advice)
    # Clients that receive option 121 ignore option 3 (RFC 3442), so the default gateway has to be in there too.
    announced = f"{METADATA_IPV4}/32,0.0.0.0" + ("" if via is None else f",0.0.0.0/0,{via}")
    advice = f"{device} itself answers, and no gateway leads there. {{announce}}"
    if subnet is None:
        advice = (
            f"its record names no subnet. If {unless}, no route is needed. Otherwise {device} itself answers. "
            "{{announce}} If guests have a gateway, add 0.0.0.0/0,GATEWAY: clients with option 121 ignore option 3."
        )
    return Route(device, advice, announced)


_Routes: TypeAlias = dict[NetworkId, Route]


@dataclass(frozen=True, slots=True)
class Part:
    """Lines for one place.

    Attributes:
        kind: `SMBIOS`, `container`, `NIC`, `route`, `systemd-imdsd`, or `note` (which has no text).
        place: Place of the lines, described in a line or more.
        text: Lines to paste; empty if there is nothing to do.
    """

    kind: str
    place: str
    text: str = ""


def _quote(text: str) -> str:
    """Quote for a shell as readably as possible: double quotes around text with single quotes."""
    if "'" in text and not set(text) & set('"$`\\!'):
        return f'"{text}"'
    return shlex.quote(text)


def _smbios(kind: int, fields: Mapping[str, str]) -> str:
    """Return QEMU's option (qemu(1)); no value may hold a comma."""
    values = (f"{name}={value}" for name, value in fields.items())
    return f"-smbios {_quote(','.join((f'type={kind}', *values)))}"


def _shown_uuid(instance: Instance) -> dict[str, str]:
    """Return the UUID for SMBIOS; nothing if cloud-init would take it for Amazon's."""
    return {} if looks_like_amazon(instance.uuid) else {"uuid": instance.uuid}


def _missing_uuid(instance: Instance) -> Iterator[Part]:
    if not _shown_uuid(instance):
        note = f"The record's UUID {instance.uuid} is omitted: cloud-init would take the machine for one of"
        yield Part("note", f"{note} Amazon's.")


def _card(place: str, port: entities.Port, text: str) -> Part:
    known = "imdsproxy identifies the guest by this MAC."
    if port.mac is None:
        known = "the record has no MAC, so the NIC may have any."
    return Part("NIC", f"{place}Network {port.network}: {known}", text)


def _routes(
    routes: _Routes, place: str = _PLACES["route"], announce: str = "dhcp-option=121,{routes}"
) -> Iterator[Part]:
    """Yield the routes of all networks to 169.254.169.254.

    Args:
        place: The hypervisor's way to announce a route, for people.
    """
    for network, route in reversed(routes.items()):
        text = announce.format(device=_quote(route.device or ""), routes=route.announced)
        advice = route.advice.replace("{announce}", place)
        yield Part("route", f"Network {network}: {advice}", text if route.announced else "")


def _imds(instance: Instance, text: str, place: str = _PLACES["imds"]) -> Iterator[Part]:
    """Yield the part for systemd-imdsd if the instance has the documents that it reads, those of EC2."""
    if Dialect.EC2 in instance.served:
        yield Part("systemd-imdsd", place, text)


def _qemu(instance: Instance, hints: DetectionHints, routes: _Routes) -> Iterator[Part]:
    places = _PLACES["qemu"]
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
    """Yield XML elements (https://libvirt.org/formatdomain.html#smbios-system-information, formatnetwork.html)."""
    places, strings = _PLACES["libvirt"], ""
    place = places["smbios"].format(name=instance.name, hints=hints)
    if Dialect.EC2 in instance.served:
        place = f"{place} {places['imds']} {_PLACES['imds']}"
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
    """Yield `qm set` commands (smbios1 in qm.conf(5): base64 values, and each call replaces the whole entry)."""
    fields = [f"{name}={b64encode(text.encode()).decode()}" for name, text in hints.system.items()]
    fields += [f"uuid={uuid}" for uuid in _shown_uuid(instance).values()]
    smbios = f"qm set VMID --smbios1 {_quote(','.join(('base64=1', *fields)))}"
    yield Part("SMBIOS", _PLACES["proxmox"]["smbios"].format(hints=hints), smbios)
    yield from _missing_uuid(instance)
    for number, port in enumerate(instance.ports):
        model = f"virtio={port.mac.upper()}" if port.mac else "virtio"
        card = f"{model},bridge={routes[port.network].device or 'BRIDGE'}"
        yield _card("", port, f"qm set VMID --net{number} {_quote(card)}")
    yield from _routes(routes)
    yield from _imds(instance, f"qm set VMID --args {_quote(_smbios(11, {'value': _EXTRA}))}")


def _incus(instance: Instance, hints: DetectionHints, routes: _Routes) -> Iterator[Part]:
    """Yield `raw.qemu` for virtual machines, and settings of process 1 for containers.

    A container's DMI is the host's, and cloud-init does not check it.
    """
    places, name = _PLACES["incus"], _quote(instance.name)
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
    text = f"incus config set {name} smbios11.{_EXTRA_KEY} {_quote(_IMDS_WORDS)}"
    yield from _imds(instance, text, f"{places['imds']} {_PLACES['imds']}")


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
    host_has: Callable[[entities.IpAddress], bool],
) -> list[Part]:
    """Return all parts that make the guest ask for the documents of `dialect`.

    `instance`: instance with this dialect. Its name must be the hypervisor's name of the guest. If SMBIOS has its UUID,
    cloud-init does not ask again at each boot.
    """
    routes = {
        port.network: plan_route(networks[port.network], host_has)
        for port in reversed(instance.ports)
    }
    return list(_WRITERS[target](instance, HINTS[dialect], routes))


def render_text(target: Target, parts: Iterable[Part]) -> str:
    """Render the snippet for people: each part under a comment that names its place."""
    blocks = []
    for part in parts:
        comment = _comment(f"{part.kind}: {part.place}", xml=target is Target.LIBVIRT)
        blocks.append(f"{comment}\n{part.text}" if part.text else comment)
    return "\n\n".join(blocks) + "\n"


def _comment(text: str, *, xml: bool) -> str:
    lines = textwrap.wrap(text, _WIDTH, break_long_words=False, break_on_hyphens=False)
    if not xml:
        return "\n".join(f"# {line}" for line in lines)
    # An XML comment must not contain two hyphens.
    safe = [line.replace("--", "- -") for line in lines]
    return "<!-- " + "\n     ".join(safe) + " -->"
