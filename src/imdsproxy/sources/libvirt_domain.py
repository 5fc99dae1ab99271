"""A domain's XML as libvirt gives it: who it is, where its interfaces are, what its metadata says.

Source: https://libvirt.org/formatdomain.html (general metadata, network interfaces).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element, ParseError, fromstring

from imdsproxy.core.records import Refused
from imdsproxy.errors import Problem
from imdsproxy.sources.libvirt_metadata import METADATA_URI, read_metadata

if TYPE_CHECKING:
    from imdsproxy.core.records import Json

__all__ = ["Domain", "DomainInterface", "parse_domain", "parse_xml"]


@dataclass(frozen=True, slots=True)
class DomainInterface:
    """A NIC that is plugged into a network of libvirt's, or into a bridge of the host's.

    Attributes:
        network: The name of a network of libvirt's.
        bridge: The bridge's device, where it is not libvirt that says so.
    """

    mac: str
    network: str | None = None
    bridge: str | None = None


@dataclass(frozen=True, slots=True)
class Domain:
    """What of a domain makes a record.

    Attributes:
        marked: It has an element of ours in its metadata.
        keys: The keys of an instance's record that this element gives.
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


def parse_xml(text: str, what: str) -> Element | Refused:
    """The root element of what libvirt wrote."""
    try:
        # libvirtd wrote it: it has no DTD, and so no entities to expand.
        return fromstring(text)  # noqa: S314 - see above
    except ParseError as error:
        return Refused((Problem("xml", f"cannot be parsed: {error}", file=what),))


def parse_domain(text: str) -> Domain | Refused:
    """A domain's XML, active or not.

    Interfaces that no host bridge carries (macvtap, user mode, passed-through devices) are left out: a guest does
    not reach its host that way.
    """
    root = parse_xml(text, "a domain")
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
