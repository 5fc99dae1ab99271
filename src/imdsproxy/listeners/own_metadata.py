"""Whether this host is itself a guest of a cloud, which has metadata for it at the same address."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from imdsproxy.core.model import METADATA_IPV4
from imdsproxy.host.netlink import route_length
from imdsproxy.host.nlmessages import NetlinkSocket

DMI: Final = Path("/sys/class/dmi/id")

# As cloud-init's ds-identify knows them.
_SIGNS: Final[Mapping[str, tuple[str, ...]]] = {
    "sys_vendor": (
        *("Akamai", "Alibaba Cloud", "Amazon EC2", "DigitalOcean", "Google", "Hetzner"),
        *("OpenStack Foundation", "Vultr", "e24cloud"),
    ),
    "product_name": ("Exoscale", "Google Compute Engine", "OpenStack Compute", "OpenStack Nova"),
    "chassis_asset_tag": (
        "7783-7084-3265-9085-8269-3286-77",  # Microsoft Azure's
        *("HUAWEICLOUD", "OpenTelekomCloud", "OracleCloud.com"),
    ),
}
_HOST_ROUTE: Final = 32


def own_metadata(channel: NetlinkSocket, dmi: Path = DMI) -> str:
    """By what it shows, in words; empty when nothing shows it.

    Args:
        channel: Of the host's own namespace.
        dmi: Where the kernel shows SMBIOS.
    """
    for name, known in _SIGNS.items():
        try:
            value = (dmi / name).read_text(errors="replace").strip()
        except OSError:
            continue  # not every machine has SMBIOS, and not every field may be read
        if value in known:
            return f"its SMBIOS says {value}"
    if route_length(channel, METADATA_IPV4) == _HOST_ROUTE:
        return f"it has a route to {METADATA_IPV4}"
    return ""
