"""The OpenStack dialect: `/openstack`, as `nova/api/metadata/base.py` serves it."""

from __future__ import annotations

from typing import Final

from imdsproxy.core.compiled import DocumentRecord
from imdsproxy.core.documents.ec2 import LATEST, named_keys
from imdsproxy.core.documents.network import render_network_data
from imdsproxy.core.documents.tree import (
    BINARY,
    JsonValue,
    Kind,
    Node,
    json_document,
    listing,
    vendor_object,
)

OPENSTACK_VERSIONS: Final = (
    "2012-08-10",
    "2013-04-04",
    "2013-10-17",
    "2015-10-15",
    "2016-06-30",
    "2016-10-06",
    "2017-02-22",
    "2018-08-27",
    "2020-10-14",
    "2025-04-04",
)
"""Oldest first; `latest` is the last of them."""

_FOLSOM, _GRIZZLY, _HAVANA, _LIBERTY, _NEWTON_ONE, _NEWTON_TWO, *_ = OPENSTACK_VERSIONS
_VICTORIA: Final = OPENSTACK_VERSIONS[-2]

OPENSTACK_LISTING: Final = Node(listing((*OPENSTACK_VERSIONS, LATEST)))
"""What `/openstack` says."""


def openstack_version(version: str) -> str | None:
    """The dated version meant; `None` for one that there is not."""
    if version == LATEST:
        return OPENSTACK_VERSIONS[-1]
    return version if version in OPENSTACK_VERSIONS else None


def openstack_directory(record: DocumentRecord, version: str) -> Node:
    """Everything below `/openstack/VERSION` (one of `OPENSTACK_VERSIONS`), in Nova's order."""
    vendor = vendor_object(record["vendor_data"])
    network = render_network_data(record)
    user_data = record["user_data"]
    files = (
        (_FOLSOM, "meta_data.json", _meta_data(record, version)),
        (_FOLSOM, "user_data", None if user_data is None else Node(user_data, BINARY)),
        (_GRIZZLY, "password", Node(b"", kind=Kind.POSTED)),
        (_HAVANA, "vendor_data.json", json_document(vendor)),
        (_LIBERTY, "network_data.json", None if network is None else json_document(network)),
        # Under `static`, where Nova has it too, cloud-init does not run it a second time.
        (_NEWTON_TWO, "vendor_data2.json", json_document({"static": vendor})),
    )
    children = {name: node for since, name, node in files if node is not None and version >= since}
    return Node(listing(children), children=children)


def _meta_data(record: DocumentRecord, version: str) -> Node:
    keys = named_keys(record)
    described: list[JsonValue] = [
        {"name": name, "type": "ssh", "data": key} for name, key in keys.items()
    ]
    fields: tuple[tuple[str, str, JsonValue], ...] = (
        (_FOLSOM, "hostname", record["hostname"]),
        (_FOLSOM, "name", record["name"]),
        (_FOLSOM, "launch_index", 0),
        (_FOLSOM, "availability_zone", record["availability_zone"]),
        (_LIBERTY, "project_id", record["project"]),
        (_NEWTON_ONE, "devices", []),
        (_VICTORIA, "dedicated_cpus", []),
    )
    document: dict[str, JsonValue] = {"uuid": record["uuid"]}
    if record["tags"]:
        document["meta"] = {**dict(record["tags"])}
    if keys:
        document |= {"public_keys": {**keys}, "keys": described}
    document |= {name: value for since, name, value in fields if version >= since}
    return json_document(document, Kind.SEEDED if version >= _GRIZZLY else Kind.FIXED)
