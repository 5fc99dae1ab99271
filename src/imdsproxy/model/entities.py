"""Domain model: networks, listeners, ports and instances.

All values are frozen, and hashable where possible, so that two states compare by value. The edges parse text into these
values (`imdsproxy.model.records`); the shell acts on them.
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

from imdsproxy.model.policy import NO_RULES, PolicyRules

ID_PATTERN: Final = "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""Pattern of network, instance and project ids, valid in every regex language: ids stand in paths, maps, headers."""

NetworkId = NewType("NetworkId", str)
"""1 to 64 of `A-Za-z0-9._-`, begins with a letter or digit: a bind's name and a map key."""

InstanceId = NewType("InstanceId", str)
"""1 to 64 of `A-Za-z0-9._-`, begins with a letter or digit: a Host value and a file name."""

MacAddress = NewType("MacAddress", str)
"""Six lower-case hexadecimal octets joined by colons."""

IpAddress: TypeAlias = IPv4Address | IPv6Address
IpNetwork: TypeAlias = IPv4Network | IPv6Network

METADATA_IPV4: Final = IPv4Address("169.254.169.254")
METADATA_IPV6: Final = IPv6Address("fe80::a9fe:a9fe")
METADATA_PORT: Final = 80

_LETTERED_ZONE: Final = re.compile(r"(.*\d)-?[a-z]")
"""Region and letter, as `eu-west-1a` (EC2) and `europe-west4-a` (GCE)."""
_CANONICAL: Final = re.compile("[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_UUID_NAMESPACE: Final = uuid.UUID("6a0f7a1e-52c5-5f0e-9d55-1f0b1a9fe169")


class Dialect(StrEnum):
    EC2 = "ec2"
    OPENSTACK = "openstack"
    NOCLOUD = "nocloud"


EVERY_DIALECT: Final = frozenset(Dialect)


class Upstream(StrEnum):
    EMBEDDED = "embedded"
    """Our own document server, from the record."""

    NOVA = "nova"
    """Nova's metadata API, by signed requests."""


class Scope(StrEnum):
    NETWORK = "network"
    ROUTER = "router"
    """Group of networks behind one namespace; no two of them share an address."""


@dataclass(frozen=True, slots=True)
class NamespaceListener:
    """Network namespace of another program (`/run/netns/NAME`).

    Attributes:
        device: Interface in the namespace for the metadata addresses; without it every interface of the namespace may
            have the addresses.
        manage_addresses: Whether imdsproxy adds the metadata addresses to `device` and removes them. If false, the
            program that made the namespace manages them, and imdsproxy reports missing ones.
        redirected: Whether rules in the namespace redirect requests to our port at every address
            (`wire.REDIRECTED_PORT`): a router must not have the metadata addresses.
    """

    namespace: str
    device: str | None = None
    manage_addresses: bool = False
    redirected: bool = False


@dataclass(frozen=True, slots=True)
class InterfaceListener:
    """Host interface; imdsproxy adds the metadata addresses and removes them."""

    device: str


@dataclass(frozen=True, slots=True)
class BridgeListener:
    """Linux bridge of the host; imdsproxy makes the namespace, the veth pair and the addresses."""

    bridge: str


Listener: TypeAlias = NamespaceListener | InterfaceListener | BridgeListener


@dataclass(frozen=True, slots=True)
class Subnet:
    """Address range of a network, shown to guests in `network_data.json` and `network-config`."""

    cidr: IpNetwork
    gateway: IpAddress | None = None
    dns: tuple[IpAddress, ...] = ()


@dataclass(frozen=True, slots=True)
class Network:
    """Isolated layer 2 or 3 domain and its listener.

    Attributes:
        scope: `ROUTER` if the id is a router's: its guests are those of the networks behind it.
        mac_check: Whether a guest's address is valid only together with its MAC; false for guests behind a router.
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
        """Whether imdsproxy checks MACs here: it does not know the MACs of guests behind a router."""
        return self.mac_check and self.scope is Scope.NETWORK


@dataclass(frozen=True, slots=True)
class Port:
    """Connection of an instance to a network.

    A guest is known by each of `addresses`, and by the link-local address derived from `mac` (EUI-64). If the network
    checks MACs, each address counts only together with `mac`. In a family without listed addresses, any address of
    `mac` then counts.

    Attributes:
        project: Project of the port, if it differs from the instance's. Nova gets the port's project, and answers 404
            if the instance belongs to another one (OSSA-2013-033: a tenant that names another tenant's instance on its
            own port must get nothing).
    """

    network: NetworkId
    mac: MacAddress | None = None
    addresses: tuple[IpAddress, ...] = ()
    project: str | None = None


@dataclass(frozen=True, slots=True)
class SshKey:
    name: str
    key: str


@dataclass(frozen=True, slots=True, eq=False)
class StoredBytes:
    """Bytes that are not in memory: up to 16 MiB for each of many instances. Equal to the bytes themselves.

    Attributes:
        owner: Instance that has this user-data.
        fetch: Loads the bytes of an owner; raises `SourceError` if they are unavailable.
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
    """Return the stem, with the suffix `-2`, `-3`, … if it is taken."""
    names = chain((stem,), (f"{stem}-{number}" for number in count(2)))
    return next(name for name in names if name not in taken)


def region_of(zone: str | None) -> str | None:
    """Return the region of a zone; a zone that is not named after a region counts as its own region."""
    match = None if zone is None else _LETTERED_ZONE.fullmatch(zone)
    return zone if match is None else match[1]


def digest_of(data: bytes) -> str:
    return blake2b(data, digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class Instance:
    """Input of an instance's documents.

    Attributes:
        id: Operator's id of the instance; a UUID is used as such (see `uuid`).
        user_data: Bytes as stored, at most 16 MiB, or a reference to them; `None` if there are none.
        vendor_data: YAML or JSON document as bytes, for the vendor data of NoCloud and OpenStack; `None` if there is
            none.
        tags: Pairs of name and value, in name order.
        upstream: Server of its documents. With `NOVA`, only `id`, `project`, `ports`, `policy` and `created_at` of the
            record are used.
        created_at: Time of its creation or rebuild, Unix time; `None` if unknown.
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
        """Trees of documents for guests: EC2 and OpenStack if Nova serves the instance."""
        nova = self.upstream is Upstream.NOVA
        return EVERY_DIALECT - {Dialect.NOCLOUD} if nova else self.dialects

    @property
    def uuid(self) -> str:
        """Return the id if it is a UUID, else a UUID that is always derived from it the same way (RFC 9562 §5.5)."""
        if _CANONICAL.fullmatch(self.id):
            return self.id
        try:
            return str(uuid.UUID(self.id))
        except ValueError:
            return str(uuid.uuid5(_UUID_NAMESPACE, self.id))

    @property
    def ec2_id(self) -> str:
        """Id in EC2's form: `i-` and 17 hexadecimal digits, derived from `uuid`."""
        if self.id.startswith("i-"):
            return self.id
        return f"i-{self.uuid.replace('-', '')[:17]}"
