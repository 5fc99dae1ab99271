"""Who lives where in the lab: what is sown in Neutron and Nova, and what an agent must find there.

Pure. Neutron chooses the ids of networks, routers and ports, so they are in a `Seed`; everything else is known
beforehand, so that tests can be parametrized with `LOOKUP_NAMES`.
"""

import gzip
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from imdsproxy.model.addresses import link_local_of
from imdsproxy.model.entities import MacAddress

HOSTS: Final = ("lab", "lab-2")
"""Whose ports bind: nodes of Neutron's."""

BLUE: Final = "b1000000000040008000000000000001"
RED: Final = "b2000000000040008000000000000002"
PUBLIC_KEY: Final = (
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIMetadataMetadataMetadataMetadataMetadata00 lab@example"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """An instance that Nova knows.

    Attributes:
        user_data: Exactly what the guest must read; None is a 404.
        metadata: Key and value, as `openstack server set --property` would.
        keyed: With an SSH key.
        tagged: Its first network device has a tag, so that it is in `devices`.
    """

    name: str
    uuid: str
    project_id: str
    user_data: bytes | None = field(default=None, repr=False)
    metadata: Mapping[str, str] = field(default_factory=dict)
    keyed: bool = False
    tagged: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkPlan:
    name: str
    project_id: str
    cidr4: str
    cidr6: str | None = None
    external: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterPlan:
    name: str
    project_id: str
    networks: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PortPlan:
    """A port as it is sown.

    Attributes:
        device_id: The instance's uuid, or what stands there instead; `{network_id}` is filled in.
        web: In the security group `web`, and not in the project's default group.
    """

    network: str
    addresses: tuple[str, ...]
    mac: str
    project_id: str
    device_id: str = ""
    device_owner: str = ""
    web: bool = False

    @property
    def link_local(self) -> str:
        return str(link_local_of(MacAddress(self.mac)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """A port as Neutron has it."""

    id: str
    network_id: str
    device_id: str
    plan: PortPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Seed:
    """What Neutron has made of the plans.

    Attributes:
        networks, routers: Name to id.
    """

    networks: Mapping[str, str]
    routers: Mapping[str, str]
    ports: tuple[Port, ...]


@dataclass(frozen=True, slots=True)
class Lookup:
    """One row of the table of truth: who asks from this address, in this network or behind this router.

    Attributes:
        scope: Name of the network or router.
        network_id, router_id: Exactly one is set.
        instance: Who it is; None where nobody must get anything.
        device_id, project_id: Of the port, if there is one.
    """

    scope: str
    network_id: str | None
    router_id: str | None
    address: str
    instance: Instance | None = None
    device_id: str = ""
    project_id: str = ""

    @property
    def name(self) -> str:
        return f"{self.scope} {self.address}"

    @property
    def scope_header(self) -> tuple[str, str]:
        """What Neutron's proxies say of where a request comes from."""
        if self.network_id is not None:
            return ("X-Neutron-Network-ID", self.network_id)
        return ("X-Neutron-Router-ID", self.router_id or "")


NETWORKS: Final = (
    NetworkPlan(name="net-ext", project_id=BLUE, cidr4="203.0.113.0/24", external=True),
    NetworkPlan(name="net-blue", project_id=BLUE, cidr4="10.0.0.0/24", cidr6="fd00:1::/64"),
    NetworkPlan(name="net-blue2", project_id=BLUE, cidr4="10.0.1.0/24"),
    # The same range as net-blue in the same project, and no router.
    NetworkPlan(name="net-green", project_id=BLUE, cidr4="10.0.0.0/24"),
    NetworkPlan(name="net-red", project_id=RED, cidr4="10.0.0.0/24", cidr6="fd00:1::/64"),
)

ROUTERS: Final = (
    RouterPlan(name="r-blue", project_id=BLUE, networks=("net-blue", "net-blue2")),
    RouterPlan(name="r-red", project_id=RED, networks=("net-red",)),
)

_BLUE_1: Final = Instance(
    name="blue-1",
    uuid="aaaaaaaa-0001-4000-8000-000000000001",
    project_id=BLUE,
    user_data=b'#cloud-config\nhostname: blue-1\nruncmd:\n  - [echo, "blue one"]\n',
    metadata={"role": "db", "colour": "blue"},
    keyed=True,
)
_BLUE_2: Final = Instance(
    name="blue-2",
    uuid="aaaaaaaa-0002-4000-8000-000000000002",
    project_id=BLUE,
    user_data=bytes(range(256)) * 8,
    tagged=True,
)
_BLUE_3: Final = Instance(
    name="blue-3", uuid="aaaaaaaa-0003-4000-8000-000000000003", project_id=BLUE
)
_GREEN_1: Final = Instance(
    name="green-1",
    uuid="cccccccc-0001-4000-8000-000000000001",
    project_id=BLUE,
    user_data="#cloud-config\n# gr\u00fcn \u2603\n".encode(),
    metadata={"colour": "green"},
    keyed=True,
)
_RED_1: Final = Instance(
    name="red-1",
    uuid="bbbbbbbb-0001-4000-8000-000000000001",
    project_id=RED,
    # Nova takes 65,535 characters of base64.
    user_data=b"#!/bin/sh\n# " + b"0123456789abcdef" * 3070,
    metadata={"role": "web", "colour": "red", "unicode": "r\u00f6d \u2603"},
    keyed=True,
)
_RED_2: Final = Instance(
    name="red-2",
    uuid="bbbbbbbb-0002-4000-8000-000000000002",
    project_id=RED,
    user_data=gzip.compress(b"#!/bin/sh\necho red two\n", mtime=0),
)
INSTANCES: Final = (_BLUE_1, _BLUE_2, _BLUE_3, _GREEN_1, _RED_1, _RED_2)

# One MAC in three networks: their link-local addresses overlap, too.
_SHARED_MAC: Final = "fa:16:3e:00:00:05"


def _of(instance: Instance, network: str, *addresses: str, mac: str, web: bool = False) -> PortPlan:
    return PortPlan(
        network=network,
        addresses=addresses,
        mac=mac,
        project_id=instance.project_id,
        device_id=instance.uuid,
        device_owner="compute:nova",
        web=web,
    )


_GUEST_PORTS: Final = (
    _of(_BLUE_1, "net-blue", "10.0.0.5", "fd00:1::5", mac=_SHARED_MAC),
    _of(_BLUE_2, "net-blue", "10.0.0.6", mac="fa:16:3e:00:00:06", web=True),
    _of(_BLUE_2, "net-blue2", "10.0.1.6", mac="fa:16:3e:00:01:06", web=True),
    _of(_BLUE_3, "net-blue2", "10.0.1.7", "10.0.1.8", mac="fa:16:3e:00:01:07"),
    _of(_GREEN_1, "net-green", "10.0.0.5", mac=_SHARED_MAC),
    _of(_RED_1, "net-red", "10.0.0.5", "fd00:1::5", mac=_SHARED_MAC),
    _of(_RED_2, "net-red", "10.0.0.6", mac="fa:16:3e:00:00:06"),
)

_BARE_PORTS: Final = tuple(
    PortPlan(
        network="net-blue",
        addresses=(f"10.0.0.{number}",),
        mac=f"fa:16:3e:00:00:{number:02}",
        project_id=BLUE,
        device_id=device_id,
        device_owner=owner,
    )
    for number, device_id, owner in (
        # A device that Nova does not know.
        (66, "dddddddd-0001-4000-8000-000000000001", "compute:nova"),
        # No device at all.
        (77, "", ""),
        # OVN's own port for metadata.
        (2, "ovnmeta-{network_id}", "network:distributed"),
        # Another project's instance on a port of this project: Nova must refuse.
        (88, _RED_2.uuid, "compute:nova"),
    )
)
PORTS: Final = (*_GUEST_PORTS, *_BARE_PORTS)

# Addresses that no port has there, though another network may have them.
_NOBODY: Final = {
    "net-blue": ("10.0.0.250",),
    "net-green": ("10.0.0.6", "fd00:1::5"),
    "net-red": ("10.0.0.66",),
    "r-blue": ("10.0.0.250",),
    "r-red": ("10.0.1.7", "10.0.0.66"),
}


def lookups_of(seed: Seed) -> tuple[Lookup, ...]:
    """Every row, with the ids that Neutron chose."""
    return tuple(_rows(seed))


def _rows(seed: Seed) -> Iterator[Lookup]:
    behind = {one.name: one.networks for one in ROUTERS}
    instances = {(one.uuid, one.project_id): one for one in INSTANCES}
    for scope in (*(one.name for one in NETWORKS), *behind):
        where = (scope, seed.networks.get(scope), seed.routers.get(scope))
        for plan in PORTS:
            if plan.network in behind.get(scope, (scope,)):
                device_id = plan.device_id.format(network_id=seed.networks[plan.network])
                instance = instances.get((plan.device_id, plan.project_id))
                for address in (*plan.addresses, plan.link_local):
                    yield Lookup(*where, address, instance, device_id, plan.project_id)
        for address in _NOBODY.get(scope, ()):
            yield Lookup(*where, address)


_ANY: Final = Seed(
    networks={plan.name: "" for plan in NETWORKS},
    routers={plan.name: "" for plan in ROUTERS},
    ports=(),
)
LOOKUP_NAMES: Final = tuple(row.name for row in lookups_of(_ANY))
