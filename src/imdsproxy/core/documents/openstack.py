"""The OpenStack dialect: `/openstack`, as `nova/api/metadata/base.py` serves it."""

from __future__ import annotations

import json
from typing import Final

from imdsproxy.core.compiled import DocumentRecord
from imdsproxy.core.documents.ec2 import LATEST, unique_names
from imdsproxy.core.documents.network import render_network_data
from imdsproxy.core.documents.tree import (
    JSON,
    Data,
    Directory,
    JsonValue,
    Leaf,
    Node,
    Password,
    Seeded,
    listing,
    vendor_object,
)

_FOLSOM: Final = "2012-08-10"
_GRIZZLY: Final = "2013-04-04"
_HAVANA: Final = "2013-10-17"
_LIBERTY: Final = "2015-10-15"
_NEWTON_ONE: Final = "2016-06-30"
_NEWTON_TWO: Final = "2016-10-06"
_OCATA: Final = "2017-02-22"
_ROCKY: Final = "2018-08-27"
_VICTORIA: Final = "2020-10-14"
_EPOXY: Final = "2025-04-04"

OPENSTACK_VERSIONS: Final = (
    _FOLSOM,
    _GRIZZLY,
    _HAVANA,
    _LIBERTY,
    _NEWTON_ONE,
    _NEWTON_TWO,
    _OCATA,
    _ROCKY,
    _VICTORIA,
    _EPOXY,
)
"""Oldest first; `latest` is the last of them."""


def openstack_listing() -> bytes:
    """What `/openstack` says."""
    return listing((*OPENSTACK_VERSIONS, LATEST))


def openstack_version(version: str) -> str | None:
    """The dated version meant; `None` for one that there is not."""
    if version == LATEST:
        return OPENSTACK_VERSIONS[-1]
    return version if version in OPENSTACK_VERSIONS else None


def openstack_directory(record: DocumentRecord, version: str) -> Directory:
    """Everything below `/openstack/VERSION` (one of `OPENSTACK_VERSIONS`), in Nova's order."""
    children: dict[str, Node] = {"meta_data.json": _meta_data(record, version)}
    if record.user_data is not None:
        children["user_data"] = Data(record.user_data)
    if version >= _GRIZZLY:
        children["password"] = Password()
    vendor = vendor_object(record.vendor_data)
    if version >= _HAVANA:
        children["vendor_data.json"] = _json(vendor)
    if version >= _LIBERTY and (network := render_network_data(record)) is not None:
        children["network_data.json"] = _json(network)
    if version >= _NEWTON_TWO:
        # Under `static`, where Nova has it too, cloud-init does not run it a second time.
        children["vendor_data2.json"] = _json({"static": vendor})
    return Directory(children, listing(children))


def _json(value: JsonValue) -> Leaf:
    return Leaf(json.dumps(value).encode("ascii"), JSON)


def _meta_data(record: DocumentRecord, version: str) -> Node:
    document: dict[str, JsonValue] = {"uuid": record.uuid}
    if record.tags:
        document["meta"] = dict(record.tags)
    if record.ssh_keys:
        names = unique_names(key.name for key in record.ssh_keys)
        keys = [key.key.strip() for key in record.ssh_keys]
        document["public_keys"] = dict(zip(names, keys, strict=True))
        document["keys"] = [
            {"name": name, "type": "ssh", "data": key}
            for name, key in zip(names, keys, strict=True)
        ]
    document["hostname"] = record.hostname
    document["name"] = record.name
    document["launch_index"] = 0
    document["availability_zone"] = record.availability_zone
    if version >= _LIBERTY:
        document["project_id"] = record.project
    if version >= _NEWTON_ONE:
        document["devices"] = []
    if version >= _VICTORIA:
        document["dedicated_cpus"] = []
    body = json.dumps(document).encode("ascii")
    if version < _GRIZZLY:
        return Leaf(body, JSON)
    return Seeded(body[:-1] + b', "random_seed": "', b'"}')
