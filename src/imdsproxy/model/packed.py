"""Instances as compressed bytes, in a tenth of the memory, unpacked on demand.

A host may have hundreds of thousands of instances, and reads few of them in any second. The bytes are JSON,
compressed with a dictionary of common values: 100 bytes instead of 1,500.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Final, TypeAlias

from imdsproxy.model.addresses import from_number, to_number
from imdsproxy.model.entities import (
    EVERY_DIALECT,
    Dialect,
    Instance,
    InstanceId,
    IpAddress,
    MacAddress,
    NetworkId,
    Port,
    SshKey,
    StoredBytes,
    Upstream,
)
from imdsproxy.model.policy import NO_RULES, PolicyRules

FORMAT: Final = 2
"""Raise it when the bytes change their meaning: stores keep them beside the records."""

_LEVEL, _WINDOW, _MEMORY = 1, -12, 5
_COMMON: Final = (
    b'null,null,"0123456789abcdef-,"fedcba9876543210"],["ecdsa-sha2-nistp256 AAAAE2VjZHNhLXNoYTItbmlzdHAyNTYAAAAIbmlz'
    b'dHAyNTY",[["ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAABAQ",[["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI",["fa:16:3e:52:'
    b'54:00:",["10.0.","192.168.","172.16.","fd00:"]],null]],[],[],null,null,null,"embedded",17'
)
_ENCODER: Final = json.JSONEncoder(separators=(",", ":"))
_DECODER: Final = json.JSONDecoder()
_COMPRESS: Final = zlib.compressobj(_LEVEL, zlib.DEFLATED, _WINDOW, _MEMORY, zdict=_COMMON)
_DECOMPRESS: Final = zlib.decompressobj(_WINDOW, zdict=_COMMON)

_PORTS: Final = 3
"""Index of the ports in a packed record."""

_KEPT: Final = 256
"""Maximum number of cached unpacked instances: enough for the addresses of one round. Callers often ask for an instance
again at once, for its next address.
"""

Fetch: TypeAlias = "Callable[[InstanceId], bytes]"
"""Loader of user-data that is not in memory."""

ClaimingPort: TypeAlias = "tuple[NetworkId, MacAddress | None, Sequence[IpAddress]]"
"""Network, MAC and addresses of a port."""

_Parts: TypeAlias = "tuple[bytes, bytes | Fetch | None, bytes | None, PolicyRules]"
"""Record, user-data, vendor data and policy."""

_Packed: TypeAlias = "bytes | _Parts"
"""Record alone, if the instance has no other parts."""


@dataclass(frozen=True, slots=True)
class PackedInstance:
    """Packed instance. Two are equal if their instances are equal."""

    id: InstanceId
    packed: _Packed

    @classmethod
    def of(cls, instance: Instance) -> PackedInstance:
        return cls(instance.id, _pack(instance))

    def open(self) -> Instance:
        return _unpack(self.id, self.packed)


class PackedInstances(MutableMapping[InstanceId, Instance]):
    """Packed instances by id. Each read returns an instance equal to the stored one."""

    __slots__ = ("_packed",)

    def __init__(self, instances: Mapping[InstanceId, Instance] | None = None) -> None:
        self._packed: dict[InstanceId, _Packed] = {}
        if instances:
            self.update(instances)

    def __getitem__(self, key: InstanceId) -> Instance:
        return _unpack(key, self._packed[key])

    def __setitem__(self, key: InstanceId, instance: Instance) -> None:
        self._packed[key] = _pack(instance)

    def __delitem__(self, key: InstanceId) -> None:
        del self._packed[key]

    def __iter__(self) -> Iterator[InstanceId]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)

    def __contains__(self, key: object) -> bool:
        return key in self._packed

    def packed(self, key: InstanceId) -> _Packed:
        return self._packed[key]

    def put(self, one: PackedInstance) -> None:
        self._packed[one.id] = one.packed

    def part(self, keys: Iterable[InstanceId]) -> PackedInstances:
        part = PackedInstances()
        part._packed = {key: self._packed[key] for key in keys}
        return part

    def plain(self, key: InstanceId) -> bytes | None:
        """Return an instance as bytes for `put_plain`; `None` if the bytes would lack a part of it."""
        data, user_data, vendor_data, policy = _parts(self._packed[key])
        whole = not isinstance(user_data, bytes) and (vendor_data, policy) == (None, NO_RULES)
        return data if whole else None

    def ports(self, key: InstanceId) -> list[ClaimingPort]:
        """Return the claims of an instance's ports without unpacking it; empty if the instance is unknown."""
        packed = self._packed.get(key)
        ports = () if packed is None else _decompress(_parts(packed)[0])[_PORTS]
        return [(network, mac, [*map(from_number, numbers)]) for network, mac, numbers, _ in ports]

    def digest(self, key: InstanceId, salt: bytes) -> bytes:
        """Return the salted digest of an instance without its policy and id."""
        packed = self._packed[key]
        data, user_data, vendor_data, _ = _parts(packed)
        made_of = blake2b(salt, digest_size=16)
        # The record has length and digest of user-data that is fetched.
        for part in (data, user_data, vendor_data):
            if isinstance(part, bytes):
                made_of.update(b"%d:" % len(part))
                made_of.update(part)
        if packed is not data and not isinstance(user_data, bytes):
            made_of.update(b"-")
        return made_of.digest()

    def mark(self, key: InstanceId) -> int:
        """Return a 128-bit digest of an instance with its id and policy."""
        policy = _parts(self._packed[key])[3]
        salt = key if policy is NO_RULES else f"{key} {policy!r}"
        return int.from_bytes(self.digest(key, salt.encode()))

    def put_plain(self, key: InstanceId, data: bytes, fetch: Fetch | None) -> None:
        """Store the bytes that `plain` returned, in this process or an earlier one of the same `FORMAT`."""
        self._packed[key] = data if fetch is None else (data, fetch, None, NO_RULES)

    def take(self, key: InstanceId, other: Mapping[InstanceId, Instance]) -> bool:
        """Copy the instance from `other`; return whether it differs from the stored one."""
        packed = other.packed(key) if isinstance(other, PackedInstances) else _pack(other[key])
        if self._packed.get(key) == packed:
            return False
        self._packed[key] = packed
        return True


class PackedPairs(MutableMapping[NetworkId, Mapping[IpAddress, MacAddress]]):
    """MAC of each address, by network. The most recently used network stays unpacked.

    Requests of one network mostly come one after the other, and a start adds a network's pairs in several parts.
    """

    __slots__ = ("_changed", "_count", "_open", "_packed")

    def __init__(self) -> None:
        self._packed: dict[NetworkId, bytes] = {}
        self._count: Counter[NetworkId] = Counter()
        self._open: tuple[NetworkId, Mapping[IpAddress, MacAddress]] | None = None
        self._changed = False

    def __getitem__(self, key: NetworkId) -> Mapping[IpAddress, MacAddress]:
        if self._open is not None and self._open[0] == key:
            return self._open[1]
        packed = self._packed[key]
        self._pack_open()
        pairs = {from_number(one): mac for one, mac in _decompress(packed)}
        self._open = key, pairs
        return pairs

    def __setitem__(self, key: NetworkId, pairs: Mapping[IpAddress, MacAddress]) -> None:
        if self._open is not None and self._open[0] != key:
            self._pack_open()
        self._open, self._changed = (key, pairs), True
        self._packed.setdefault(key, b"")
        self._count[key] = len(pairs)

    def __delitem__(self, key: NetworkId) -> None:
        del self._packed[key], self._count[key]
        if self._open is not None and self._open[0] == key:
            self._open, self._changed = None, False

    def _pack_open(self) -> None:
        if self._open is not None and self._changed:
            key, pairs = self._open
            self._packed[key] = _compress([(to_number(one), mac) for one, mac in pairs.items()])
            self._changed = False

    def __iter__(self) -> Iterator[NetworkId]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)

    @property
    def total(self) -> int:
        return self._count.total()


def _compress(value: object) -> bytes:
    packing = _COMPRESS.copy()
    text = _ENCODER.encode(value).encode("ascii")
    return packing.compress(text) + packing.flush()


def _decompress(packed: bytes) -> Any:
    return _DECODER.raw_decode(_DECOMPRESS.copy().decompress(packed).decode("ascii"))[0]


def _parts(packed: _Packed) -> _Parts:
    return (packed, None, None, NO_RULES) if isinstance(packed, bytes) else packed


def _pack(instance: Instance) -> _Packed:
    every, stored = instance.dialects == EVERY_DIALECT, instance.user_data
    record = (
        instance.name,
        None if instance.hostname == instance.name else instance.hostname,
        instance.project,
        [
            (port.network, port.mac, [to_number(one) for one in port.addresses], port.project)
            for port in instance.ports
        ],
        [(key.name, key.key) for key in instance.ssh_keys],
        instance.tags,
        instance.availability_zone,
        instance.instance_type,
        None if every else sorted(instance.dialects),
        instance.upstream,
        instance.created_at,
        (stored.length, stored.digest) if isinstance(stored, StoredBytes) else None,
    )
    user_data = stored.fetch if isinstance(stored, StoredBytes) else stored
    packed = _compress(record)
    beside = user_data, instance.vendor_data, instance.policy
    return packed if beside == (None, None, NO_RULES) else (packed, *beside)


@lru_cache(_KEPT)
def _unpack(key: InstanceId, packed: _Packed) -> Instance:
    data, user_data, vendor_data, policy = _parts(packed)
    # The record has the fields that `_pack` wrote.
    record: list[Any] = _decompress(data)
    name, hostname, project, ports, ssh_keys, tags, zone, kind, *rest = record
    dialects, upstream, created, stored = rest
    return Instance(
        key,
        name,
        name if hostname is None else hostname,
        project,
        tuple(
            Port(network, mac, tuple(map(from_number, numbers)), of_port)
            for network, mac, numbers, of_port in ports
        ),
        tuple(SshKey(*ssh_key) for ssh_key in ssh_keys),
        tuple((tag, value) for tag, value in tags),
        user_data
        if user_data is None or isinstance(user_data, bytes)
        else StoredBytes(stored[0], stored[1], key, user_data),
        vendor_data,
        zone,
        kind,
        EVERY_DIALECT if dialects is None else frozenset(map(Dialect, dialects)),
        Upstream(upstream),
        policy,
        created,
    )
