"""What a hypervisor must show a guest so that it asks for metadata, and how 169.254.169.254 is reached.

cloud-init runs `ds-identify` before anything else and stays off unless the machine looks like a cloud. What it
looks at is SMBIOS, or for containers the environment and the command line of process 1. `snippets.toml` has what must
be seen for a dialect, `plan_route` how 169.254.169.254 is reached; `imdsproxy.core.snippets.targets` writes both as
QEMU, libvirt, Proxmox or Incus take them.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib.resources import files
from typing import Final

from imdsproxy.core import model
from imdsproxy.core.model import METADATA_IPV4, Dialect


class Target(StrEnum):
    """The hypervisor that a snippet is for."""

    QEMU = "qemu"
    LIBVIRT = "libvirt"
    PROXMOX = "proxmox"
    INCUS = "incus"


@dataclass(frozen=True, slots=True)
class DetectionHints:
    """What a guest must see of itself; `snippets.toml` says what the fields are."""

    asks: str
    system: Mapping[str, str]
    kernel: str
    environment: Mapping[str, str]


_TABLES: Final = tomllib.loads(
    files("imdsproxy.core.snippets").joinpath("snippets.toml").read_text("utf-8")
)
HINTS: Final = {Dialect(name): DetectionHints(**one) for name, one in _TABLES["hints"].items()}
PLACES: Final = _TABLES["places"]
"""Where the parts of a snippet go: texts of all hypervisors, and by hypervisor."""

IMDS_WORDS: Final = (
    "systemd.imds=1 systemd.imds.network=unlocked systemd.imds.vendor=imdsproxy "
    f"systemd.imds.data_url=http://{METADATA_IPV4}/latest systemd.imds.address_ipv4={METADATA_IPV4} "
    "systemd.imds.key.hostname=/meta-data/hostname "
    "systemd.imds.key.zone=/meta-data/placement/availability-zone "
    "systemd.imds.key.ssh_key=/meta-data/public-keys/0/openssh-key "
    "systemd.imds.key.userdata=/user-data"
)
"""The kernel command line by which systemd-imdsd (systemd 261) finds the EC2 documents.

Its hwdb knows neither OpenStack nor a plain KVM guest. Without `unlocked` it keeps every other program of the guest
away from the address, cloud-init among them. No token is asked for: there are none.
"""

_AMAZON: Final = re.compile(r"ec2.*|[0-9a-f]*2[0-9a-f]ec", re.IGNORECASE)


def dialects_of(instance: model.Instance) -> frozenset[Dialect]:
    """The documents that the instance has; Nova has those of OpenStack and EC2."""
    of_nova = frozenset({Dialect.OPENSTACK, Dialect.EC2})
    return of_nova if instance.upstream is model.Upstream.NOVA else instance.dialects


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


@dataclass(frozen=True, slots=True)
class Route:
    """How the guests of a network reach 169.254.169.254.

    Attributes:
        device: The host's device that guests are attached to, `None` where the network is a foreign namespace.
        advice: What is to be done, for people, with `{announce}` for how the hypervisor announces a route.
        announced: DHCP option 121 as dnsmasq writes it, pairs of destination and gateway, 0.0.0.0 for on-link; empty
            where nothing is to be announced.
    """

    device: str | None
    advice: str
    announced: str = ""


def plan_route(network: model.Network, host_has: Callable[[model.IpAddress], bool]) -> Route:
    """How the guests of a network reach 169.254.169.254.

    Args:
        network: The network's record; its first IPv4 subnet's gateway counts.
        host_has: Whether an address is one of the host's own.
    """
    subnet = next(
        (one for one in network.subnets if one.cidr.version == METADATA_IPV4.version), None
    )
    via = None if subnet is None else subnet.gateway
    match network.listener:
        case model.NamespaceListener(namespace):
            advice = (
                f"the owner of the namespace {namespace} leads guests to {METADATA_IPV4} (Neutron's DHCP server "
                "announces the route)."
            )
            return Route(None, advice)
        case model.BridgeListener(device):
            # `listeners.nft_scripts` leads there what is for the gateway, whichever host that is.
            answered, unless = via is not None, "guests have a gateway"
        case model.InterfaceListener(device):
            answered, unless = via is not None and host_has(via), "the guests' gateway is this host"
    if answered:
        advice = f"no route is needed; what guests send to their gateway for {METADATA_IPV4} is answered on {device}."
        return Route(device, advice)
    # Clients that receive option 121 ignore option 3 (RFC 3442), so the default gateway has to be in there too.
    announced = f"{METADATA_IPV4}/32,0.0.0.0" + ("" if via is None else f",0.0.0.0/0,{via}")
    advice = f"no gateway leads there, {device} itself answers. {{announce}}"
    if subnet is None:
        advice = (
            f"nothing, if {unless}; its record names no subnet. Else {device} itself answers. {{announce}} If guests "
            "have a gateway, add 0.0.0.0/0,GATEWAY: clients that receive option 121 ignore the other one."
        )
    return Route(device, advice, announced)
