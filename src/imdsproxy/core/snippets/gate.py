"""The detection gate: what opens it for each dialect (cloud-init's `tools/ds-identify`)."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from imdsproxy.core.documents.nocloud import NOCLOUD_ROOT
from imdsproxy.core.model import METADATA_IPV4, Dialect
from imdsproxy.core.snippets.model import Target

_URL: Final = f"http://{METADATA_IPV4}"

PREFERENCE: Final[Mapping[Target, tuple[Dialect, ...]]] = {
    Target.QEMU: (Dialect.OPENSTACK, Dialect.NOCLOUD, Dialect.EC2),
    Target.LIBVIRT: (Dialect.OPENSTACK, Dialect.NOCLOUD, Dialect.EC2),
    Target.PROXMOX: (Dialect.OPENSTACK, Dialect.NOCLOUD, Dialect.EC2),
    Target.INCUS: (Dialect.NOCLOUD, Dialect.OPENSTACK, Dialect.EC2),
}
"""The first that the record has is the default.

OpenStack's is asked by cloud-init, cloudbase-init, Ignition and most others. Images for Incus seed a NoCloud
directory by themselves, and a guest with that takes NoCloud first: there only NoCloud's own address helps.
"""


@dataclass(frozen=True, slots=True)
class Gate:
    """What a guest must see of itself.

    Attributes:
        dialect: Which documents it then asks for.
        system: Fields of SMBIOS type 1 by QEMU's names, without the UUID.
        kernel: The same as one word of the kernel command line, which wins over SMBIOS.
        environment: The same as variables of process 1, where there is such a way.
    """

    dialect: Dialect
    system: Mapping[str, str]
    kernel: str
    environment: Mapping[str, str]


_GATES: Final[Mapping[Dialect, Gate]] = {
    # As Nova itself makes its guests' (`nova/virt/libvirt/driver.py`); Ohai looks at the manufacturer.
    Dialect.OPENSTACK: Gate(
        Dialect.OPENSTACK,
        {"manufacturer": "OpenStack Foundation", "product": "OpenStack Nova"},
        "ds=OpenStack",
        {"product_name": "OpenStack Nova"},
    ),
    Dialect.NOCLOUD: Gate(
        Dialect.NOCLOUD,
        {"serial": f"ds=nocloud;s={_URL}/{NOCLOUD_ROOT}/"},
        f"ds=nocloud;s={_URL}/{NOCLOUD_ROOT}/",
        {},
    ),
    # Not Amazon's own sign, a UUID that begins with ec2: cloud-init then insists on session tokens. This
    # vendor's is the one sign of EC2 that asks for none and is a field of type 1, which all targets can set.
    Dialect.EC2: Gate(Dialect.EC2, {"manufacturer": "e24cloud"}, "ds=Ec2", {}),
}

_AMAZON: Final = re.compile(r"ec2.*|[0-9a-f]*2[0-9a-f]ec", re.IGNORECASE)


def plan_gate(dialect: Dialect) -> Gate:
    """What a guest must see so that it asks for the documents of `dialect`."""
    return _GATES[dialect]


def choose_dialect(target: Target, dialects: Collection[Dialect]) -> Dialect | None:
    """The best of those that the record has; `None` when it has none."""
    return next((one for one in PREFERENCE[target] if one in dialects), None)


def looks_like_amazon(uuid: str) -> bool:
    """Whether cloud-init takes a machine with this SMBIOS UUID for one of Amazon's, in either byte order."""
    return _AMAZON.fullmatch(uuid.partition("-")[0]) is not None


def plan_imds() -> str:
    """The kernel command line by which systemd-imdsd (systemd 261) finds the EC2 documents.

    Its hwdb knows neither OpenStack nor a plain KVM guest. Without `unlocked` it keeps everybody else in the
    guest away from the address, cloud-init among them. No token is asked for: there are none.
    """
    words = {
        "imds": "1",
        "imds.network": "unlocked",
        "imds.vendor": "imdsproxy",
        "imds.data_url": f"{_URL}/latest",
        "imds.address_ipv4": str(METADATA_IPV4),
        "imds.key.hostname": "/meta-data/hostname",
        "imds.key.zone": "/meta-data/placement/availability-zone",
        "imds.key.ssh_key": "/meta-data/public-keys/0/openssh-key",
        "imds.key.userdata": "/user-data",
    }
    return " ".join(f"systemd.{name}={value}" for name, value in words.items())
