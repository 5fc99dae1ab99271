"""What the three processes say to each other, declared once: headers, map values, socket names.

A guest's request reaches the document server and the resolver with these headers, set by HAProxy after
everything the guest sent under any other name than the allow-list has been deleted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from imdsproxy.core.model import InstanceId

__all__ = [
    "HEADER_ADDRESS",
    "HEADER_INSTANCE",
    "HEADER_NETWORK",
    "HEADER_REVISION",
    "MAP_CONFLICT",
    "MAP_TOMBSTONE",
    "MapValue",
    "RETRY_AFTER_S",
    "parse_map_value",
    "render_map_value",
]

HEADER_NETWORK: Final = "x-imdsproxy-network"
HEADER_ADDRESS: Final = "x-imdsproxy-address"
HEADER_INSTANCE: Final = "x-imdsproxy-instance"
HEADER_REVISION: Final = "x-imdsproxy-revision"

RETRY_AFTER_S: Final = 1
"""What every 503 tells a client to wait, in seconds: cloud-init's own pace."""

MAP_TOMBSTONE: Final = "-"
"""An overlay's word for "not in the base any more": the address is unknown."""

MAP_CONFLICT: Final = "!"
"""Two instances claim the address."""


@dataclass(frozen=True, slots=True)
class MapValue:
    """What the data plane knows of one (network, address): whose it is, and in which revision."""

    instance: InstanceId
    revision: str


def render_map_value(value: MapValue) -> str:
    """The value's one word in a map: `INSTANCE|REVISION`."""
    return f"{value.instance}|{value.revision}"


def parse_map_value(text: str) -> MapValue | None:
    """The reverse of `render_map_value`; `None` for a tombstone, a conflict or a foreign word."""
    instance, separator, revision = text.partition("|")
    if not separator or not instance or not revision:
        return None
    return MapValue(InstanceId(instance), revision)
