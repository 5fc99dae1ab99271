"""The words of the design as values: networks, listeners, ports, instances.

Everything here is frozen and hashable where it can be, so that two states compare by value. Parsing
text into these values belongs to the edges (`imdsproxy.core.records`), acting on them to the shell.
"""

import re
import uuid
from collections.abc import Callable, Container
from dataclasses import dataclass
from enum import StrEnum
from hashlib import blake2b
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from itertools import chain, count
from typing import Final, NewType, TypeAlias

from imdsproxy.core.policy import NO_RULES, PolicyRules

ID_PATTERN: Final = "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""Ids of networks, instances and projects, in every language that matches them: they stand in paths, maps, headers."""

NetworkId = NewType("NetworkId", str)
"""1 to 64 of `A-Za-z0-9._-`, begins with a letter or digit: it is a bind's name and a map key."""

InstanceId = NewType("InstanceId", str)
"""1 to 64 of `A-Za-z0-9._-`, begins with a letter or digit: it is a Host value and a file name."""

MacAddress = NewType("MacAddress", str)
"""Six lower-case hexadecimal octets joined by colons."""

IpAddress: TypeAlias = IPv4Address | IPv6Address
IpNetwork: TypeAlias = IPv4Network | IPv6Network

METADATA_IPV4: Final = IPv4Address("169.254.169.254")
METADATA_IPV6: Final = IPv6Address("fe80::a9fe:a9fe")
METADATA_PORT: Final = 80

_CANONICAL: Final = re.compile("[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_UUID_NAMESPACE: Final = uuid.UUID("6a0f7a1e-52c5-5f0e-9d55-1f0b1a9fe169")


class Dialect(StrEnum):
    """A tree of documents that an instance can have on or off."""

    EC2 = "ec2"
    OPENSTACK = "openstack"
    NOCLOUD = "nocloud"


EVERY_DIALECT: Final = frozenset(Dialect)


class Upstream(StrEnum):
    """Where an instance's documents come from."""

    EMBEDDED = "embedded"
    """Our own document server, out of the record."""

    NOVA = "nova"
    """Nova's metadata API, asked with a signed request."""


class Scope(StrEnum):
    """What an id that is reached through one listener stands for."""

    NETWORK = "network"
    ROUTER = "router"
    """A group of networks reached through one namespace; no two of them share an address."""


@dataclass(frozen=True, slots=True)
class NamespaceListener:
    """A network namespace that another program makes (`/run/netns/NAME`).

    Attributes:
        namespace: The name in `/run/netns`.
        device: The interface inside that carries (or is to carry) the metadata addresses; without it
            the addresses are looked for on every interface of the namespace.
        manage_addresses: Put the metadata addresses on `device` and take them away again. Off: they
            are left to the program that made the namespace, and reported when missing.
        redirected: Rules in the namespace lead requests to a port of ours at every address
            (`wire.REDIRECTED_PORT`): a router must not have the metadata addresses.
    """

    namespace: str
    device: str | None = None
    manage_addresses: bool = False
    redirected: bool = False


@dataclass(frozen=True, slots=True)
class InterfaceListener:
    """A host interface; the metadata addresses are added to it and removed by us."""

    device: str


@dataclass(frozen=True, slots=True)
class BridgeListener:
    """A Linux bridge of the host; we make the namespace, the veth pair and the addresses."""

    bridge: str


Listener: TypeAlias = NamespaceListener | InterfaceListener | BridgeListener


@dataclass(frozen=True, slots=True)
class Subnet:
    """One address range of a network, shown to guests in `network_data.json` and `network-config`."""

    cidr: IpNetwork
    gateway: IpAddress | None = None
    dns: tuple[IpAddress, ...] = ()


@dataclass(frozen=True, slots=True)
class Network:
    """An isolated layer 2 or 3 domain and how it is reached.

    Attributes:
        scope: `ROUTER` where the id is a router's: its guests are those of the networks behind it.
        mac_check: Believe a guest's address only together with its MAC; off where guests are behind a router.
        policy: What its record says for its guests.
    """

    id: NetworkId
    listener: Listener
    name: str = ""
    project: str | None = None
    subnets: tuple[Subnet, ...] = ()
    mtu: int | None = None
    scope: Scope = Scope.NETWORK
    mac_check: bool = True
    policy: PolicyRules = NO_RULES

    @property
    def checks_macs(self) -> bool:
        """Whether MACs count here: behind a router a guest's is unknown."""
        return self.mac_check and self.scope is Scope.NETWORK


@dataclass(frozen=True, slots=True)
class Port:
    """An instance's place in a network.

    A guest is known by each of `addresses`, and by the link-local address made of `mac` (EUI-64). Where the
    network checks MACs, it is known together with `mac` only, and in a family in which it lists no address by
    whatever address `mac` has.

    Attributes:
        project: The port's own where it is another one than the instance's. Nova gets the port's, and
            answers 404 where the instance is not that project's (OSSA-2013-033: a tenant that names another's
            instance on a port of his own must get nothing).
    """

    network: NetworkId
    mac: MacAddress | None = None
    addresses: tuple[IpAddress, ...] = ()
    project: str | None = None


@dataclass(frozen=True, slots=True)
class SshKey:
    """A public key under a name, as `public-keys/` lists it."""

    name: str
    key: str


@dataclass(frozen=True, slots=True, eq=False)
class StoredBytes:
    """Bytes that are not in memory: up to 16 MiB for each of many instances. Equal to the bytes themselves.

    Attributes:
        length: How many.
        digest: Of `digest_of`.
        owner: Whose user-data it is.
        fetch: Gets them for an owner; raises `SourceError` where they cannot be had now.
    """

    length: int
    digest: str
    owner: InstanceId
    fetch: Callable[[InstanceId], bytes]

    def __bytes__(self) -> bytes:
        return self.fetch(self.owner)

    def __len__(self) -> int:
        return self.length

    def __eq__(self, other: object) -> bool:
        if isinstance(other, bytes):
            return len(other) == self.length and digest_of(other) == self.digest
        return isinstance(other, StoredBytes) and other.digest == self.digest

    def __hash__(self) -> int:
        return hash(self.digest)


def free_name(stem: str, taken: Container[str]) -> str:
    """The stem, or with `-2`, `-3`, … after it where that is taken."""
    names = chain((stem,), (f"{stem}-{number}" for number in count(2)))
    return next(name for name in names if name not in taken)


def digest_of(data: bytes) -> str:
    """What tells two payloads apart: BLAKE2b-16, hexadecimal."""
    return blake2b(data, digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class Instance:
    """Everything an instance's documents are made of.

    Attributes:
        id: The operator's id; a UUID is used as such (see `uuid`).
        user_data: The bytes as stored, at most 16 MiB, or where they are; `None` when there is none.
        vendor_data: A YAML or JSON document as bytes for NoCloud's and OpenStack's vendor data;
            `None` when there is none.
        tags: Name and value pairs in name order.
        upstream: Who has its documents. With `NOVA` all that counts of the record is `id`, `project`, `ports`,
            `policy` and `created_at`.
        policy: What its record says for it.
        created_at: When it was made or built anew, Unix time; `None` where that is unknown.
    """

    id: InstanceId
    name: str
    hostname: str
    project: str | None = None
    ports: tuple[Port, ...] = ()
    ssh_keys: tuple[SshKey, ...] = ()
    tags: tuple[tuple[str, str], ...] = ()
    user_data: bytes | StoredBytes | None = None
    vendor_data: bytes | None = None
    availability_zone: str | None = None
    instance_type: str | None = None
    dialects: frozenset[Dialect] = EVERY_DIALECT
    upstream: Upstream = Upstream.EMBEDDED
    policy: PolicyRules = NO_RULES
    created_at: int | None = None

    @property
    def served(self) -> frozenset[Dialect]:
        """The trees of documents that there are for guests: Nova has those of EC2 and OpenStack."""
        nova = self.upstream is Upstream.NOVA
        return EVERY_DIALECT - {Dialect.NOCLOUD} if nova else self.dialects

    @property
    def uuid(self) -> str:
        """The id where it is a UUID, else one derived from it that never changes (RFC 9562 §5.5)."""
        if _CANONICAL.fullmatch(self.id):
            return self.id
        try:
            return str(uuid.UUID(self.id))
        except ValueError:
            return str(uuid.uuid5(_UUID_NAMESPACE, self.id))

    @property
    def ec2_id(self) -> str:
        """EC2's form of the id: `i-` and 17 hexadecimal digits, derived from `uuid`."""
        if self.id.startswith("i-"):
            return self.id
        return f"i-{self.uuid.replace('-', '')[:17]}"
