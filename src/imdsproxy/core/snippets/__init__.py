"""What a hypervisor must show a guest so that it asks for metadata, and how 169.254.169.254 is reached.

cloud-init runs `ds-identify` before anything else and stays off unless the machine looks like a cloud. What it
looks at is SMBIOS, or for containers the environment and the command line of process 1. `HINTS` has what must be seen
for a dialect, `plan_nic` how 169.254.169.254 is reached; `imdsproxy.core.snippets.targets` writes both as QEMU,
libvirt, Proxmox or Incus take them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, assert_never

from imdsproxy.core.documents.nocloud import NOCLOUD_ROOT
from imdsproxy.core.model import (
    METADATA_IPV4,
    BridgeListener,
    Dialect,
    InterfaceListener,
    IpAddress,
    MacAddress,
    NamespaceListener,
    Network,
    NetworkId,
)


class Target(StrEnum):
    """The hypervisor that a snippet is for."""

    QEMU = "qemu"
    LIBVIRT = "libvirt"
    PROXMOX = "proxmox"
    INCUS = "incus"


@dataclass(frozen=True, slots=True)
class Nic:
    """A port of the instance as the hypervisor must plug it in, and how the guest reaches 169.254.169.254 by it.

    Attributes:
        bridge: The host's device that the guest is to be attached to, `None` where the network is a foreign namespace.
        advice: For people, with `{where}` for what the hypervisor's way to announce a route is.
        announced: DHCP option 121 as dnsmasq writes it, pairs of destination and gateway, 0.0.0.0 for on-link; empty
            where nothing is to be announced.
    """

    network: NetworkId
    mac: MacAddress | None
    bridge: str | None
    advice: str
    announced: str = ""


@dataclass(frozen=True, slots=True)
class Guest:
    """An instance as a hypervisor knows it.

    Attributes:
        name: What the hypervisor is assumed to call it.
        uuid: The record's; cloud-init compares it with SMBIOS and then does not ask again at each boot.
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


_URL: Final = f"http://{METADATA_IPV4}"


@dataclass(frozen=True, slots=True)
class DetectionHints:
    """What a guest must see of itself.

    Attributes:
        asks: What then happens.
        system: Fields of SMBIOS type 1 by QEMU's names, without the UUID.
        kernel: The same as one word of the kernel command line, which wins over SMBIOS.
        environment: The same as variables of process 1, where there is such a way.
    """

    asks: str
    system: Mapping[str, str]
    kernel: str
    environment: Mapping[str, str]


HINTS: Final[Mapping[Dialect, DetectionHints]] = {
    # As Nova itself makes its guests' (`nova/virt/libvirt/driver.py`); Ohai looks at the manufacturer.
    Dialect.OPENSTACK: DetectionHints(
        "cloud-init takes OpenStack; cloudbase-init and Ignition ask the same documents.",
        {"manufacturer": "OpenStack Foundation", "product": "OpenStack Nova"},
        "ds=OpenStack",
        {"product_name": "OpenStack Nova"},
    ),
    Dialect.NOCLOUD: DetectionHints(
        "cloud-init takes NoCloud, from the address in the serial number.",
        {"serial": f"ds=nocloud;s={_URL}/{NOCLOUD_ROOT}/"},
        f"ds=nocloud;s={_URL}/{NOCLOUD_ROOT}/",
        {},
    ),
    # Not Amazon's own sign, a UUID that begins with ec2: cloud-init then insists on session tokens. This
    # vendor's is the one sign of EC2 that asks for none and is a field of type 1, which all targets can set.
    Dialect.EC2: DetectionHints(
        "cloud-init takes Ec2, without session tokens.",
        {"manufacturer": "e24cloud"},
        "ds=Ec2",
        {},
    ),
}

IMDS_WORDS: Final = " ".join(
    f"systemd.{word}"
    for word in (
        "imds=1",
        "imds.network=unlocked",
        "imds.vendor=imdsproxy",
        f"imds.data_url={_URL}/latest",
        f"imds.address_ipv4={METADATA_IPV4}",
        "imds.key.hostname=/meta-data/hostname",
        "imds.key.zone=/meta-data/placement/availability-zone",
        "imds.key.ssh_key=/meta-data/public-keys/0/openssh-key",
        "imds.key.userdata=/user-data",
    )
)
"""The kernel command line by which systemd-imdsd (systemd 261) finds the EC2 documents.

Its hwdb knows neither OpenStack nor a plain KVM guest. Without `unlocked` it keeps every other program of the guest
away from the address, cloud-init among them. No token is asked for: there are none.
"""

_AMAZON: Final = re.compile(r"ec2.*|[0-9a-f]*2[0-9a-f]ec", re.IGNORECASE)


def choose_dialect(target: Target, dialects: Collection[Dialect]) -> Dialect | None:
    """The best of those that the record has; `None` when it has none.

    OpenStack's is asked by cloud-init, cloudbase-init, Ignition and most others. Images for Incus seed a NoCloud
    directory by themselves, and a guest with that takes NoCloud first: there only NoCloud's own address helps.
    """
    first = (Dialect.OPENSTACK, Dialect.NOCLOUD)
    order = (*(reversed(first) if target is Target.INCUS else first), Dialect.EC2)
    return next((one for one in order if one in dialects), None)


def looks_like_amazon(uuid: str) -> bool:
    """Whether cloud-init takes a machine with this SMBIOS UUID for one of Amazon's, in either byte order."""
    return _AMAZON.fullmatch(uuid.partition("-")[0]) is not None


def plan_nic(
    network: Network, mac: MacAddress | None, host_has: Callable[[IpAddress], bool]
) -> Nic:
    """How a guest is plugged into the network, and reaches the metadata address.

    Args:
        network: The network's record; its first IPv4 subnet's gateway counts.
        mac: The port's.
        host_has: Whether an address is one of the host's own.
    """
    subnet = next(
        (one for one in network.subnets if one.cidr.version == METADATA_IPV4.version), None
    )
    via = None if subnet is None else subnet.gateway
    match network.listener:
        case NamespaceListener(namespace):
            advice = (
                f"the owner of the namespace {namespace} leads guests to {METADATA_IPV4} (Neutron's DHCP server "
                "announces the route)."
            )
            return Nic(network.id, mac, None, advice)
        case BridgeListener(device):
            # `listeners.nft_scripts` leads there what is for the gateway, whichever host that is.
            answered, unless = via is not None, "guests have a gateway"
        case InterfaceListener(device):
            answered, unless = via is not None and host_has(via), "the guests' gateway is this host"
        case _ as never:
            assert_never(never)
    if answered:
        advice = f"no route is needed; what guests send to their gateway for {METADATA_IPV4} is answered on {device}."
        return Nic(network.id, mac, device, advice)
    # Clients that receive option 121 ignore option 3 (RFC 3442), so the default gateway has to be in there too.
    announced = f"{METADATA_IPV4}/32,0.0.0.0" + ("" if via is None else f",0.0.0.0/0,{via}")
    advice = f"no gateway leads there, {device} itself answers. {{where}}"
    if subnet is None:
        advice = (
            f"nothing, if {unless}; its record names no subnet. Else {device} itself answers. {{where}} If guests "
            "have a gateway, add 0.0.0.0/0,GATEWAY: clients that receive option 121 ignore the other one."
        )
    return Nic(network.id, mac, device, advice, announced)
