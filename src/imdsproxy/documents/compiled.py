r"""Compiled record: the document server's input for one instance, as the bytes of one file.

    {"revision":"<16 hex>","format":2,…,"vendor_data":[length,digest],"user_data":[length,digest]}\n
    <vendor_data><user_data>

The first line is JSON in ASCII; the two pieces of data follow raw, byte for byte. `revision` is the BLAKE2b-8 of the
rest of the line. The line has the digests of the data, so the revision identifies the whole content, and it detects a
damaged head. The record also has copies of its networks' values (subnet, gateway, name servers, MTU), so that the
document server needs no lookup.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final, TypedDict, cast

from imdsproxy.errors import RecordCorrupt
from imdsproxy.model.entities import Instance, InstanceId, IpAddress, Network, NetworkId, Port

FORMAT: Final = 2
"""Raise it when a document's text changes for the same instance: revisions then differ from the older version's, and
HAProxy's cached documents are no longer used. During an upgrade each version reads the other's records, so a new key
may be missing.
"""

_ENCODER: Final = json.JSONEncoder(separators=(",", ":"))
_HEAD_START: Final = b'{"revision":"'
_REVISION_LENGTH: Final = 16
_HEAD_REST: Final = len(_HEAD_START) + _REVISION_LENGTH


@dataclass(frozen=True, slots=True)
class CompiledRecord:
    """Compiled record of an instance, ready to write; 16 hexadecimal digits, the revision, identify its content."""

    revision: str
    content: bytes


@dataclass(frozen=True, slots=True)
class Blob:
    """Place of a piece of data in the content: `offset` and `length` in bytes."""

    offset: int
    length: int

    def __len__(self) -> int:
        return self.length


class DocumentAddress(TypedDict):
    """Address of a port as text, with the values of its subnet.

    `ip` is IPv4 or IPv6, never a link-local address. `cidr` is the network's subnet that contains it, `None` if there
    is no such subnet.
    """

    ip: str
    cidr: str | None
    gateway: str | None
    dns: list[str]


class DocumentPort(TypedDict):
    network: str
    mac: str | None
    mtu: int | None
    addresses: list[DocumentAddress]


class DocumentRecord(TypedDict):
    """Parsed compiled record: its first line, and its data.

    `revision` is empty if the record has another format: its documents are correct, but must not be cached. `region` is
    the settings' region. `vendor_data` is bytes, `user_data` a place in the content; in the line both are length and
    digest.
    """

    revision: str
    format: int
    id: str
    uuid: str
    ec2_id: str
    name: str
    hostname: str
    project: str | None
    availability_zone: str | None
    region: str | None
    instance_type: str | None
    dialects: list[str]
    ssh_keys: list[tuple[str, str]]
    tags: list[tuple[str, str]]
    ports: list[DocumentPort]
    vendor_data: bytes | None
    user_data: Blob | None


_KEYS: Final = tuple(key for key in DocumentRecord.__annotations__ if key != "revision")
"""Keys of the first line after the revision, in the line's order; most are attributes of the instance."""


def compile_instance(
    instance: Instance, networks: Mapping[NetworkId, Network], region: str | None = None
) -> CompiledRecord:
    """Compile an instance; equal instances in equal networks and regions give equal bytes.

    A port in a network that is not in `networks` keeps its addresses and lacks the network's values. Raises
    `SourceError` if User-data that is not in memory is unavailable.
    """
    user_data = None if instance.user_data is None else bytes(instance.user_data)
    made = {
        "format": FORMAT,
        "region": region,
        "dialects": sorted(instance.dialects),
        "ssh_keys": [[key.name, key.key] for key in instance.ssh_keys],
        "ports": [_describe_port(port, networks.get(port.network)) for port in instance.ports],
        "vendor_data": _describe(instance.vendor_data),
        "user_data": _describe(user_data),
    }
    head = {name: made[name] if name in made else getattr(instance, name) for name in _KEYS}
    rest = b'",' + _ENCODER.encode(head)[1:].encode("ascii") + b"\n"
    revision = _digest(rest)
    head_bytes = _HEAD_START + revision.encode("ascii") + rest
    content = b"".join((head_bytes, instance.vendor_data or b"", user_data or b""))
    return CompiledRecord(revision, content)


def network_mark(network: Network) -> bytes:
    """Return a digest of the network's values that are copied into its ports' compiled records."""
    return blake2b(repr((network.mtu, network.subnets)).encode(), digest_size=8).digest()


def _describe(data: bytes | None) -> list[int | str] | None:
    return None if data is None else [len(data), _digest(data)]


def _digest(data: bytes | memoryview) -> str:
    return blake2b(data, digest_size=8).hexdigest()


def _describe_port(port: Port, network: Network | None) -> DocumentPort:
    return {
        "network": port.network,
        "mac": port.mac,
        "mtu": None if network is None else network.mtu,
        "addresses": [
            _describe_address(address, network)
            for address in port.addresses
            if not address.is_link_local
        ],
    }


def _describe_address(address: IpAddress, network: Network | None) -> DocumentAddress:
    subnets = () if network is None else network.subnets
    subnet = next((one for one in subnets if address in one.cidr), None)
    if subnet is None:
        return {"ip": str(address), "cidr": None, "gateway": None, "dns": []}
    return {
        "ip": str(address),
        "cidr": str(subnet.cidr),
        "gateway": None if subnet.gateway is None else str(subnet.gateway),
        "dns": [str(server) for server in subnet.dns],
    }


def compiled_path(instance_id: InstanceId) -> str:
    """Return the record's path below the documents directory: `ab/<id>.rec`, spread over 256 directories."""
    shard = blake2b(instance_id.encode("utf-8"), digest_size=1).hexdigest()
    return f"{shard}/{instance_id}.rec"


def parse_compiled(content: bytes) -> DocumentRecord:
    """Parse a compiled record and verify all of its bytes.

    Raises `RecordCorrupt` if the content is truncated, has extra bytes, fails a checksum, or has a format that lacks a
    required key.
    """
    end = content.find(b"\n") + 1
    if not end or not content.startswith(_HEAD_START):
        raise RecordCorrupt("compiled record has no head")
    revision = content[len(_HEAD_START) : _HEAD_REST]
    if _digest(memoryview(content)[_HEAD_REST:end]).encode("ascii") != revision:
        raise RecordCorrupt("compiled record's head fails its checksum")
    # The checksum has just shown that `compile_instance` wrote this line.
    head: dict[str, Any] = {"region": None, **json.loads(content[:end])}
    if not DocumentRecord.__required_keys__ <= head.keys():
        raise RecordCorrupt(f"compiled record has format {head['format']} instead of {FORMAT}")
    if head["format"] != FORMAT:
        head["revision"] = ""
    for name in ("vendor_data", "user_data"):
        blob = head[name] = _locate(content, head[name], end)
        end += 0 if blob is None else blob.length
    if end != len(content):
        raise RecordCorrupt(f"compiled record has {len(content)} bytes instead of {end}")
    if (vendor := head["vendor_data"]) is not None:
        head["vendor_data"] = content[vendor.offset : vendor.offset + vendor.length]
    return cast("DocumentRecord", head)


def _locate(content: bytes, described: list[int | str] | None, offset: int) -> Blob | None:
    if described is None:
        return None
    length, digest = described
    blob = Blob(offset, int(length))
    if _digest(memoryview(content)[offset : offset + blob.length]) != digest:
        raise RecordCorrupt(f"compiled record's data at byte {offset} fails its checksum")
    return blob
