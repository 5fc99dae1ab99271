"""Parse an instance's record."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from imdsproxy.core.model import (
    Dialect,
    Instance,
    IpAddress,
    MacAddress,
    NetworkId,
    Port,
    Upstream,
)
from imdsproxy.core.policy import NOTHING_SAID
from imdsproxy.core.records.fields import Field, LineOf, Path, Refused, optional, root
from imdsproxy.core.records.moments import parse_moment
from imdsproxy.core.records.payload import ReadFile, parse_user_data, parse_vendor_data
from imdsproxy.core.records.policy import parse_policy
from imdsproxy.core.records.scalars import (
    hostname_of,
    parse_guest_address,
    parse_hostname,
    parse_instance_id,
    parse_mac,
    parse_network_id,
    parse_project_id,
)
from imdsproxy.core.records.ssh_keys import parse_ssh_keys

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["INSTANCE_KEYS", "PORT_KEYS", "parse_instance"]

_DOCUMENTS: Final = (
    "ssh_keys",
    "tags",
    "user_data",
    "user_data_file",
    "vendor_data",
    "availability_zone",
    "instance_type",
    "dialects",
)
"""What Nova has of its instances itself."""

INSTANCE_KEYS: Final = (
    "id",
    "name",
    "hostname",
    "project",
    "ports",
    "upstream",
    "policy",
    "created_at",
    *_DOCUMENTS,
)

PORT_KEYS: Final = ("network", "mac", "addresses", "project")

_TAG_VALUE: Final = re.compile("[^\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]{0,4096}")


def parse_instance(
    record: object,
    *,
    read_file: ReadFile | None = None,
    file: str | None = None,
    line_of: LineOf | None = None,
    path: Path = (),
) -> Instance | Refused:
    """An instance, or everything that is wrong with its record.

    Args:
        record: The mapping, as YAML or JSON gives it.
        read_file: Reads what `user_data_file` names; without it the key is refused.
        file: The file it comes from, for the problems.
        line_of: Where its parts stand in that file.
        path: Where the record stands in its document, as `("instances", 3)`.
    """
    field, findings = root(record, file=file, line_of=line_of, path=path)
    entries = field.mapping(INSTANCE_KEYS, required=("id", "name"))
    if entries is None:
        return Refused(tuple(findings.problems))
    instance_id = optional(entries, "id", parse_instance_id)
    name = optional(entries, "name", Field.text)
    hostname = optional(entries, "hostname", parse_hostname)
    upstream = _parse_upstream(entries)
    of_nova = upstream is Upstream.NOVA
    project = optional(entries, "project", parse_project_id if of_nova else Field.text)
    ports = _parse_ports(entries["ports"]) if "ports" in entries else ()
    ssh_keys = parse_ssh_keys(entries["ssh_keys"]) if "ssh_keys" in entries else ()
    tags = _parse_tags(entries["tags"]) if "tags" in entries else ()
    user_data = parse_user_data(entries, read_file)
    vendor_data = optional(entries, "vendor_data", parse_vendor_data)
    availability_zone = optional(entries, "availability_zone", Field.text)
    instance_type = optional(entries, "instance_type", Field.text)
    dialects = _parse_dialects(entries)
    policy = optional(entries, "policy", parse_policy)
    created_at = optional(entries, "created_at", parse_moment)
    if findings.problems or instance_id is None or name is None:
        return Refused(tuple(findings.problems), instance_id)
    return Instance(
        id=instance_id,
        name=name,
        hostname=hostname or hostname_of(name, instance_id),
        project=project,
        ports=ports,
        ssh_keys=ssh_keys,
        tags=tags,
        user_data=user_data,
        vendor_data=vendor_data,
        availability_zone=availability_zone,
        instance_type=instance_type,
        dialects=dialects,
        upstream=upstream,
        policy=policy or NOTHING_SAID,
        created_at=created_at,
    )


def _parse_upstream(entries: Mapping[str, Field]) -> Upstream:
    field = entries.get("upstream")
    word = None if field is None else field.one_of([upstream.value for upstream in Upstream])
    upstream = Upstream.EMBEDDED if word is None else Upstream(word)
    if field is not None and upstream is Upstream.NOVA:
        if "project" not in entries:
            field.refuse("needs project", "Nova is told whose instance it is")
        for key in _DOCUMENTS:
            if key in entries:
                entries[key].refuse("does not go with upstream: nova", "Nova has it")
    return upstream


def _parse_ports(field: Field) -> tuple[Port, ...]:
    ports = []
    addresses: set[tuple[NetworkId, IpAddress]] = set()
    macs: set[tuple[NetworkId, MacAddress]] = set()
    for item in field.items():
        entries = item.mapping(PORT_KEYS, required=("network",))
        if entries is None:
            continue
        network = optional(entries, "network", parse_network_id)
        mac = optional(entries, "mac", parse_mac)
        project = optional(entries, "project", parse_project_id)
        listed = entries["addresses"].items() if "addresses" in entries else []
        found = [(each, parse_guest_address(each)) for each in listed]
        if network is None:
            continue
        if mac is not None and (network, mac) in macs:
            entries["mac"].refuse(f"{mac} is there twice in network {network}")
        elif mac is not None:
            macs.add((network, mac))
        for each, address in found:
            if address is not None and (network, address) in addresses:
                each.refuse(f"{address} is there twice in network {network}")
            elif address is not None:
                addresses.add((network, address))
        ports.append(Port(network, mac, tuple(a for _, a in found if a is not None), project))
    return tuple(ports)


def _parse_tags(field: Field) -> tuple[tuple[str, str], ...]:
    entries = field.mapping()
    if entries is None:
        return ()
    tags = []
    for key, entry in entries.items():
        name = field.child(key, key).text()
        value = entry.matched(_TAG_VALUE, "text, at most 4096 characters, no control characters")
        if name is not None and value is not None:
            tags.append((name, value))
    return tuple(sorted(tags))


def _parse_dialects(entries: Mapping[str, Field]) -> frozenset[Dialect]:
    field = entries.get("dialects")
    chosen = None if field is None else field.mapping([dialect.value for dialect in Dialect])
    off = {Dialect(key) for key, entry in (chosen or {}).items() if entry.boolean() is False}
    return frozenset(Dialect) - off
