"""Which paths there can be: what our documents and Nova's have names for, whatever a record holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, TypeAlias

from imdsproxy.core.documents.ec2 import EC2_CATEGORIES

_Names: TypeAlias = "Mapping[str, _Names | None]"

_ANYTHING: Final = None
_NOTHING: Final[_Names] = {}
_OF_NOVA: Final = (
    "ancestor-ami-ids",
    "kernel-id",
    "product-codes",
    "public-hostname",
    "public-ipv4",
    "ramdisk-id",
)
"""`nova/api/metadata/base.py`, `get_ec2_metadata`: what ours have not."""

_TREE: Final[_Names] = {
    "latest": {
        "meta-data": dict.fromkeys((*EC2_CATEGORIES, *_OF_NOVA), _ANYTHING),
        "user-data": _NOTHING,
        "dynamic": {"instance-identity": _ANYTHING},
    },
    "openstack": {
        "content": _ANYTHING,
        "latest": dict.fromkeys(
            (
                "meta_data.json",
                "network_data.json",
                "password",
                "user_data",
                "vendor_data.json",
                "vendor_data2.json",
            ),
            _NOTHING,
        ),
    },
    "nocloud": dict.fromkeys(("meta-data", "network-config", "user-data", "vendor-data"), _NOTHING),
}


def can_be_served(path: str) -> bool:
    """Whether there can be a document at a plain path (`core.path_rules`), or beneath it."""
    names: _Names | None = _TREE
    for name in filter(None, path.split("/")):
        if names is _ANYTHING:
            return True
        if name not in names:
            return False
        names = names[name]
    return True
