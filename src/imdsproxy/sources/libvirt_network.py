"""A network's XML as libvirt gives it, and the record that it makes.

Source: https://libvirt.org/formatnetwork.html (connectivity, addressing, static hosts).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv6Interface, ip_interface
from typing import TYPE_CHECKING, Final, TypeAlias
from xml.etree.ElementTree import Element

from imdsproxy.core.model import Network
from imdsproxy.core.records import Refused, parse_network
from imdsproxy.sources.libvirt_domain import parse_xml

if TYPE_CHECKING:
    from imdsproxy.core.records import Json

__all__ = ["LibvirtNetwork", "describe_network", "parse_libvirt_network"]

_Interface: TypeAlias = IPv4Interface | IPv6Interface

_ISOLATED: Final = "isolated"
_BRIDGED_BY_LIBVIRT: Final = frozenset({_ISOLATED, "nat", "route", "open"})
_ROUTING: Final = frozenset({"nat", "route", "open"})


@dataclass(frozen=True, slots=True)
class LibvirtNetwork:
    """What of a network makes a record.

    Attributes:
        mode: `<forward mode>`; `isolated` without that element.
        bridge: Its bridge; libvirt makes it, or with mode `bridge` the operator.
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
        """Its bridge is libvirt's, so that how it is reached is known here."""
        return self.mode in _BRIDGED_BY_LIBVIRT and self.bridge is not None


def parse_libvirt_network(text: str, *, active: bool) -> LibvirtNetwork | Refused:
    """A network's XML: the live one where it is active."""
    root = parse_xml(text, "a network")
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

    Guests are told the host as their gateway where libvirt's DHCP does: not in an isolated network.

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
