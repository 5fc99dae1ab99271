"""Parser of libvirt's XML of domains and networks, and of our element in a domain's metadata.

Sources: https://libvirt.org/formatdomain.html (general metadata, network interfaces) and
https://libvirt.org/formatnetwork.html (connectivity, addressing, static hosts).

Our element in a domain's `<metadata>`, which gives keys of an instance's record:

    <imds:instance xmlns:imds="urn:imdsproxy:libvirt:1" id="ID">      id: the domain's UUID without it
      <imds:hostname>NAME</imds:hostname>                             made of the domain's name without it
      <imds:ssh-key name="NAME">ssh-ed25519 AAAA…</imds:ssh-key>      as many as there are; name is optional
      <imds:user-data encoding="base64">…</imds:user-data>            without encoding: text
      <imds:vendor-data>…</imds:vendor-data>                          the same
      <imds:tag name="NAME">VALUE</imds:tag>                          as many as there are
      <imds:project>, <imds:availability-zone>, <imds:instance-type>
      <imds:dialect name="ec2" serve="no"/>
    </imds:instance>

No element names a file: otherwise an account that may define a domain could make root pass any file to a guest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv6Interface, ip_interface
from typing import Any, Final, TypeAlias
from xml.etree.ElementTree import Element, ParseError, fromstring

from imdsproxy.errors import Problem
from imdsproxy.model.records import Json, Refused
from imdsproxy.model.records.schema import nearest

Interface: TypeAlias = IPv4Interface | IPv6Interface

_ISOLATED: Final = "isolated"
ROUTING: Final = frozenset({"nat", "route", "open"})

METADATA_URI: Final = "urn:imdsproxy:libvirt:1"
"""XML namespace of our element. It is a URN, so it needs no domain name and nothing can be fetched from it."""

_Record: TypeAlias = "dict[str, Json]"

_BLANKS: Final = " \t\r\n"


@dataclass(frozen=True, slots=True)
class DomainInterface:
    """NIC on a libvirt network or on a bridge of the host.

    `bridge`: device of the bridge, if the domain names the bridge itself.
    """

    mac: str
    network: str | None = None
    bridge: str | None = None


@dataclass(frozen=True, slots=True)
class Domain:
    """Parts of a domain that are used for a record.

    Attributes:
        marked: Whether the domain has our element in its metadata.
        keys: Keys of an instance's record from this element.
    """

    uuid: str
    name: str
    interfaces: tuple[DomainInterface, ...]
    marked: bool
    keys: dict[str, Json]
    problems: tuple[Problem, ...]

    @property
    def place(self) -> str:
        return f"domain {self.name}"


@dataclass(frozen=True, slots=True)
class LibvirtNetwork:
    """Parts of a network that are used for a record.

    Attributes:
        mode: `<forward mode>`; `isolated` without that element.
        bridge: Bridge of the network, created by libvirt or, with mode `bridge`, by the operator.
        addresses: Addresses of the host on the bridge, with their prefixes.
        hosts: MAC and address of each `<host>` with both: dnsmasq gives that address to that MAC only.
        resolves: Whether the network's dnsmasq answers DNS at the host's addresses.
        active: Whether the network runs, so that the bridge exists.
    """

    uuid: str
    name: str
    mode: str
    bridge: str | None
    addresses: tuple[Interface, ...]
    hosts: tuple[tuple[str, str], ...]
    mtu: int | None
    resolves: bool
    active: bool

    @property
    def place(self) -> str:
        return f"network {self.name}"

    @property
    def made_by_libvirt(self) -> bool:
        """Whether libvirt creates the network's bridge, so that imdsproxy knows how to reach the guests."""
        return self.mode in {_ISOLATED, *ROUTING} and self.bridge is not None


def _parse(text: str, what: str) -> Element | Refused:
    try:
        # libvirtd wrote the XML: it has no DTD, and so no entities to expand.
        return fromstring(text)  # noqa: S314 - see above
    except ParseError as error:
        return Refused((Problem("xml", f"cannot be parsed: {error}", file=what),))


def parse_domain(text: str) -> Domain | Refused:
    """Parse the XML of an active or inactive domain.

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
    for element in root.iterfind("devices/interface[mac][source]"):
        mac, kind = _attribute(element, "mac", "address") or "", element.get("type")
        if kind == "network":
            yield DomainInterface(mac, network=_attribute(element, "source", "network"))
        elif kind == "bridge":
            yield DomainInterface(mac, bridge=_attribute(element, "source", "bridge"))


def _attribute(root: Element, child: str, name: str) -> str | None:
    found = root.find(child)
    return None if found is None else found.get(name)


def parse_libvirt_network(text: str, *, active: bool) -> LibvirtNetwork | Refused:
    """Parse a network's XML; for an active network, its live XML."""
    root = _parse(text, "a network")
    if isinstance(root, Refused):
        return root
    size = _attribute(root, "mtu", "size") or ""
    return LibvirtNetwork(
        uuid=root.findtext("uuid", ""),
        name=root.findtext("name", ""),
        # libvirt's own default of the attribute is nat.
        mode=_ISOLATED
        if root.find("forward") is None
        else _attribute(root, "forward", "mode") or "nat",
        bridge=_attribute(root, "bridge", "name"),
        addresses=tuple(
            ip_interface(f"{each.attrib['address']}/{prefix}")
            for each in root.iterfind("ip[@address]")
            if (prefix := each.get("prefix") or each.get("netmask")) is not None
        ),
        hosts=tuple(
            (host.attrib["mac"].lower(), host.attrib["ip"])
            for host in root.iterfind("ip/dhcp/host[@mac][@ip]")
        ),
        mtu=int(size) if size.isdecimal() else None,
        resolves=_attribute(root, "dns", "enable") in {None, "yes"},
        active=active,
    )


def read_metadata(element: Element, place: str) -> tuple[_Record, tuple[Problem, ...]]:
    problems: list[Problem] = []
    record: dict[str, Any] = {}

    def refuse(name: str, reason: str, hint: str = "") -> None:
        problems.append(Problem(f"instance.{name}".rstrip("."), reason, hint, place))

    def check_attributes(of: Element, name: str, known: tuple[str, ...]) -> None:
        hint = f"known: {', '.join(known)}" if known else "it has none"
        for key in sorted(of.attrib.keys() - set(known)):
            refuse(name, f"unknown attribute {key}", hint)

    check_attributes(element, "", ("id",))
    if "id" in element.attrib:
        record["id"] = element.attrib["id"]
    if _text(element):
        refuse("", "holds text outside its elements", "put it into <imds:user-data>")
    prefix = f"{{{METADATA_URI}}}"
    for child in element:
        name = child.tag.removeprefix(prefix)
        if name not in _ELEMENTS or not child.tag.startswith(prefix):
            refuse(name, "unknown element", nearest(name, sorted(_ELEMENTS)))
            continue
        key, attributes, read = _ELEMENTS[name]
        check_attributes(child, name, attributes)
        try:
            _put(record, key, read(child))
        except _Wrong as wrong:
            refuse(name, *wrong.args)
    return record, tuple(problems)


def _put(record: dict[str, Any], key: str, value: Json | tuple[str, Json]) -> None:
    if isinstance(value, tuple):
        name, inner = value
        if key == "tags" and name in record.get(key, ()):
            raise _Wrong(f"{name} appears twice")
        record.setdefault(key, {})[name] = inner
    elif key == "ssh_keys":
        record.setdefault(key, []).append(value)
    elif key in record:
        raise _Wrong("appears twice")
    else:
        record[key] = value


class _Wrong(Exception):
    """Problem of an element, with a hint."""


def _text(element: Element) -> str:
    return (element.text or "").strip(_BLANKS)


def _ssh_key(element: Element) -> Json:
    name = element.get("name")
    return _text(element) if name is None else {"name": name, "key": _text(element)}


def _tag(element: Element) -> tuple[str, str]:
    name = element.get("name")
    if name is None:
        raise _Wrong("has no name", '<imds:tag name="role">web</imds:tag>')
    return name, element.text or ""


def _dialect(element: Element) -> tuple[str, bool]:
    name, serve = element.get("name"), element.get("serve")
    if name is None or serve not in {"yes", "no"}:
        raise _Wrong("is not understood", '<imds:dialect name="ec2" serve="no"/>')
    return name, serve == "yes"


def _payload(element: Element) -> Json:
    text, encoding = element.text or "", element.get("encoding")
    if encoding is None:
        # Drop the line end after the opening tag: `#cloud-config` must be first.
        first, end, rest = text.partition("\n")
        return rest if end and not first.strip(_BLANKS) else text
    if encoding == "base64" and element.tag.endswith("}user-data"):
        return {"base64": "".join(text.split())}
    raise _Wrong(f"unknown encoding {encoding}", "base64 (user-data), or none: text")


_ELEMENTS: Final[
    Mapping[str, tuple[str, tuple[str, ...], Callable[[Element], Json | tuple[str, Json]]]]
] = {
    "hostname": ("hostname", (), _text),
    "project": ("project", (), _text),
    "availability-zone": ("availability_zone", (), _text),
    "instance-type": ("instance_type", (), _text),
    "ssh-key": ("ssh_keys", ("name",), _ssh_key),
    "tag": ("tags", ("name",), _tag),
    "dialect": ("dialects", ("name", "serve"), _dialect),
    "user-data": ("user_data", ("encoding",), _payload),
    "vendor-data": ("vendor_data", ("encoding",), _payload),
}
"""Elements by name: key in the record, attributes, and a function that returns a value, or a name and a value."""
