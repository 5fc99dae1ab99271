"""Libvirt's XML of domains and networks, and the record that a network makes.

Sources: https://libvirt.org/formatdomain.html (general metadata, network interfaces) and
https://libvirt.org/formatnetwork.html (connectivity, addressing, static hosts).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv6Interface, ip_interface
from typing import Final, TypeAlias
from xml.etree.ElementTree import Element, ParseError, fromstring

from imdsproxy.core.model import Network
from imdsproxy.core.records import Json, Refused, parse_network
from imdsproxy.errors import Problem
from imdsproxy.sources.libvirt.metadata import METADATA_URI, read_metadata

_Interface: TypeAlias = IPv4Interface | IPv6Interface

_ISOLATED: Final = "isolated"
_ROUTING: Final = frozenset({"nat", "route", "open"})


@dataclass(frozen=True, slots=True)
class DomainInterface:
    """A NIC on a network of libvirt's, or on a bridge of the host's.

    Attributes:
        network: The name of a network of libvirt's.
        bridge: The bridge's device, where the domain names it itself.
    """

    mac: str
    network: str | None = None
    bridge: str | None = None


@dataclass(frozen=True, slots=True)
class Domain:
    """The parts of a domain that make a record.

    Attributes:
        marked: It has an element of ours in its metadata.
        keys: The keys of an instance's record from this element.
        problems: What in that element is not understood.
    """

    uuid: str
    name: str
    interfaces: tuple[DomainInterface, ...]
    marked: bool
    keys: dict[str, Json]
    problems: tuple[Problem, ...]

    @property
    def place(self) -> str:
        """Where its record is written, for problems."""
        return f"domain {self.name}"


@dataclass(frozen=True, slots=True)
class LibvirtNetwork:
    """The parts of a network that make a record.

    Attributes:
        mode: `<forward mode>`; `isolated` without that element.
        bridge: Its bridge; libvirt creates it, or with mode `bridge` the operator.
        addresses: Those that the host has on the bridge, with their prefixes.
        hosts: MAC and address of each `<host>` that names both: dnsmasq gives that address to that MAC only.
        resolves: Its dnsmasq answers DNS at the host's addresses.
        active: It runs: the bridge is there.
    """

    uuid: str
    name: str
    mode: str
    bridge: str | None
    addresses: tuple[_Interface, ...]
    hosts: tuple[tuple[str, str], ...]
    mtu: int | None
    resolves: bool
    active: bool

    @property
    def place(self) -> str:
        """Where its record is written, for problems."""
        return f"network {self.name}"

    @property
    def made_by_libvirt(self) -> bool:
        """Its bridge is libvirt's, so that it is known how to reach it."""
        return self.mode in {_ISOLATED, *_ROUTING} and self.bridge is not None


def _parse(text: str, what: str) -> Element | Refused:
    try:
        # libvirtd wrote it: it has no DTD, and so no entities to expand.
        return fromstring(text)  # noqa: S314 - see above
    except ParseError as error:
        return Refused((Problem("xml", f"cannot be parsed: {error}", file=what),))


def parse_domain(text: str) -> Domain | Refused:
    """A domain's XML, active or not.

    Interfaces without a host bridge (macvtap, user mode, passed-through devices) are ignored: their guests do not reach
    the host.
    """
    root = _parse(text, "a domain")
    if isinstance(root, Refused):
        return root
    name = root.findtext("name", "")
    element = root.find(f"metadata/{{{METADATA_URI}}}instance")
    keys, problems = ({}, ()) if element is None else read_metadata(element, f"domain {name}")
    return Domain(
        uuid=root.findtext("uuid", ""),
        name=name,
        interfaces=tuple(_interfaces(root)),
        marked=element is not None,
        keys=keys,
        problems=problems,
    )


def _interfaces(root: Element) -> Iterator[DomainInterface]:
    for element in root.iterfind("devices/interface"):
        mac, source = element.find("mac"), element.find("source")
        if mac is None or source is None:
            continue
        address = mac.get("address", "")
        if element.get("type") == "network":
            yield DomainInterface(address, network=source.get("network"))
        elif element.get("type") == "bridge":
            yield DomainInterface(address, bridge=source.get("bridge"))


def parse_libvirt_network(text: str, *, active: bool) -> LibvirtNetwork | Refused:
    """A network's XML: the live one where it is active."""
    root = _parse(text, "a network")
    if isinstance(root, Refused):
        return root
    forward, bridge, mtu, dns = (root.find(tag) for tag in ("forward", "bridge", "mtu", "dns"))
    size = "" if mtu is None else mtu.get("size", "")
    return LibvirtNetwork(
        uuid=root.findtext("uuid", ""),
        name=root.findtext("name", ""),
        # libvirt's own default of the attribute is nat.
        mode=_ISOLATED if forward is None else forward.get("mode", "nat"),
        bridge=None if bridge is None else bridge.get("name"),
        addresses=tuple(_addresses(root)),
        hosts=tuple(_hosts(root)),
        mtu=int(size) if size.isdecimal() else None,
        resolves=dns is None or dns.get("enable", "yes") == "yes",
        active=active,
    )


def _addresses(root: Element) -> Iterator[_Interface]:
    for element in root.iterfind("ip"):
        prefix = element.get("prefix") or element.get("netmask")
        address = element.get("address")
        if address is not None and prefix is not None:
            yield ip_interface(f"{address}/{prefix}")


def _hosts(root: Element) -> Iterator[tuple[str, str]]:
    for element in root.iterfind("ip/dhcp/host"):
        mac, address = element.get("mac"), element.get("ip")
        if mac is not None and address is not None:
            yield mac.lower(), address


def describe_network(network: LibvirtNetwork, identity: str) -> Network | Refused:
    """The record of a network whose bridge is libvirt's.

    Its gateway is the host where libvirt's DHCP says the same: not in an isolated network.

    Args:
        network: `made_by_libvirt`.
        identity: The record's id.
    """
    record: dict[str, Json] = {"id": identity, "listener": {"bridge": network.bridge or ""}}
    if identity != network.name:
        record["name"] = network.name
    if network.mtu is not None:
        record["mtu"] = network.mtu
    subnets = [_subnet(network, each) for each in network.addresses]
    if subnets:
        record["subnets"] = list(subnets)
    return parse_network(record, file=network.place, path=("network",))


def _subnet(network: LibvirtNetwork, address: _Interface) -> dict[str, Json]:
    subnet: dict[str, Json] = {"cidr": str(address.network)}
    if network.mode in _ROUTING:
        subnet["gateway"] = str(address.ip)
    if network.resolves:
        subnet["dns"] = [str(address.ip)]
    return subnet
