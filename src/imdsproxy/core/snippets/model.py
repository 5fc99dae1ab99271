"""What a snippet is made of, and its parts."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from imdsproxy.core.model import Dialect, MacAddress, NetworkId
from imdsproxy.core.snippets.route import Route


class Target(StrEnum):
    """Whose words a snippet is in."""

    QEMU = "qemu"
    LIBVIRT = "libvirt"
    PROXMOX = "proxmox"
    INCUS = "incus"


@dataclass(frozen=True, slots=True)
class Nic:
    """A port of the instance as the hypervisor must plug it in.

    Attributes:
        bridge: The host's device that the guest is to be attached to, `None` where the network is somebody
            else's namespace.
    """

    network: NetworkId
    mac: MacAddress | None
    bridge: str | None
    route: Route


@dataclass(frozen=True, slots=True)
class Guest:
    """An instance as a hypervisor needs to know it.

    Attributes:
        name: What the hypervisor is assumed to call it.
        uuid: The record's; cloud-init compares it with SMBIOS and then need not ask again at each boot.
    """

    name: str
    uuid: str
    dialects: frozenset[Dialect]
    nics: tuple[Nic, ...] = ()


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


@dataclass(frozen=True, slots=True)
class Snippet:
    """Everything for one guest on one target."""

    target: Target
    dialect: Dialect
    parts: tuple[Part, ...]
