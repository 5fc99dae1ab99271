"""A genuine libvirtd as what a source reads: the suite's records, written as domains and networks."""

from __future__ import annotations

import asyncio
import base64
import importlib
from collections.abc import Iterable
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any, Final
from xml.sax.saxutils import escape, quoteattr

from imdsproxy.core.model import (
    BridgeListener,
    Instance,
    InstanceId,
    MacAddress,
    Network,
    Subnet,
)
from imdsproxy.core.observation import Observation
from imdsproxy.core.timing import Backoff
from imdsproxy.errors import Problem
from imdsproxy.sources.api import Origin, Publish
from imdsproxy.sources.libvirt.client import SystemLibvirt
from imdsproxy.sources.libvirt.source import LibvirtSource
from imdsproxy.sources.libvirt.xml import METADATA_URI
from imdsproxy.sources.settings import LibvirtSourceSettings
from support.libvirt_daemon import Libvirtd, machine

_GATEWAY: Final = "10.0.0.1"
_CIDR: Final = "10.0.0.0/24"
_SERVED: Final = "n1"
_ADD: Final = "ADD_LAST"
_DELETE: Final = "DELETE"


def libvirt_source(libvirtd: Libvirtd, reread_s: float = 0.2) -> LibvirtSource:
    """A source that looks often."""
    settings = LibvirtSourceSettings.model_construct(reread_s=reread_s)
    return LibvirtSource(SystemLibvirt(libvirtd.uri), settings, backoff=Backoff(0.05, 0.2))


def metadata_xml(instance: Instance) -> str:
    """A record as our element; what is as without an element is left out."""
    inside = f"<imds:hostname>{escape(instance.hostname)}</imds:hostname>"
    if instance.user_data is not None:
        encoded = base64.encodebytes(bytes(instance.user_data)).decode()
        inside += f"<imds:user-data encoding='base64'>{encoded}</imds:user-data>"
    return _element(inside, instance.id)


def _element(inside: str, identity: str | None = None) -> str:
    key = "" if identity is None else f" id={quoteattr(identity)}"
    return f"<imds:instance xmlns:imds='{METADATA_URI}'{key}>{inside}</imds:instance>"


def uuid_of(name: str) -> str:
    """A UUID for a name; names of one length have them in their own order."""
    return f"00000000-0000-4000-8000-{name.encode()[:6].ljust(6, b'.').hex()}"


def domain_xml(
    name: str, interfaces: Iterable[tuple[str, str]], metadata: str = "", uuid: str | None = None
) -> str:
    """A domain that could be started: 16 MiB, no disk, interfaces as (`network=n1`, MAC)."""
    plugged = ""
    for place, mac in interfaces:
        kind, _, where = place.partition("=")
        plugged += (
            f"<interface type='{kind}'><source {kind}='{where}'/><mac address='{mac}'/>"
            "<model type='virtio'/></interface>"
        )
    return (
        f"<domain type='qemu'><name>{name}</name><uuid>{uuid or uuid_of(name)}</uuid>"
        f"<memory unit='MiB'>16</memory><metadata>{metadata}</metadata>"
        f"<os><type arch='{machine()}'>hvm</type></os><features><acpi/></features>"
        f"<devices>{plugged}</devices></domain>"
    )


def define_domain(libvirtd: Libvirtd, name: str, *interfaces: tuple[str, str], inside: str) -> Any:  # noqa: ANN401 - libvirt has no types
    """Define a domain whose element holds `inside`."""
    text = domain_xml(name, interfaces, _element(inside))
    return libvirtd.connection.defineXML(text)


class LibvirtBacking:
    """Domains whose element has the record's id, addresses as static hosts of their networks.

    Every interface of libvirt's has a MAC, and the suite's ports have not all: made-up ones are taken out of what the
    source tells. Networks have one range, so that only the first runs.
    """

    def __init__(self, libvirtd: Libvirtd) -> None:
        self._libvirtd = libvirtd
        self._made_up: dict[str, MacAddress] = {}
        self._leases: dict[str, list[tuple[str, str, str]]] = {}
        self._networks: dict[str, Network] = {}

    def source(self) -> _WithoutMadeUp:
        return _WithoutMadeUp(libvirt_source(self._libvirtd), self._made_up)

    def seen(self, instance: Instance) -> Instance:
        return instance

    def seen_network(self, network: Network) -> Network:
        subnet = Subnet(ip_network(_CIDR), ip_address(_GATEWAY), (ip_address(_GATEWAY),))
        return replace(network, subnets=(subnet,))

    async def put(
        self, networks: Iterable[Network] = (), instances: Iterable[Instance] = ()
    ) -> tuple[Problem, ...]:
        return await asyncio.to_thread(self._put, tuple(networks), tuple(instances))

    async def remove_network(self, network_id: str) -> None:
        def remove() -> None:
            network = self._libvirtd.connection.networkLookupByName(network_id)
            network.destroy()
            network.undefine()

        del self._networks[network_id]
        await asyncio.to_thread(remove)

    async def remove_instance(self, instance_id: str) -> None:
        def remove() -> None:
            self._libvirtd.connection.lookupByName(instance_id).undefine()
            self._release(instance_id, list(self._leases_of(instance_id)))

        await asyncio.to_thread(remove)

    async def spoil(self, instance_id: str) -> str:
        place = (f"network={_SERVED}", self._mac(instance_id))
        text = domain_xml(instance_id, [place], _element("<imds:key/>", instance_id))
        await asyncio.to_thread(self._libvirtd.connection.defineXML, text)
        return "instance"

    async def claim_twice(self, victim: Instance, thief_id: str) -> tuple[Problem, ...]:
        thief = replace(victim, id=InstanceId(thief_id), name=thief_id)
        return await asyncio.to_thread(self._put, (), (thief,))

    async def close(self) -> None:
        await asyncio.to_thread(self._libvirtd.clear)

    def _put(
        self, networks: tuple[Network, ...], instances: tuple[Instance, ...]
    ) -> tuple[Problem, ...]:
        for network in networks:
            self._put_network(network)
        wanted = {each.id: self._wanted(each) for each in instances}
        # libvirt has one address for a MAC and one MAC for an address: who changes lets go of his first.
        taken = {part for leases in wanted.values() for _, *parts in leases for part in parts}
        for instance_id, leases in wanted.items():
            before = [each for each in self._leases_of(instance_id) if each not in leases]
            self._release(instance_id, [each for each in before if taken & {*each}])
        return tuple(
            problem for each in instances for problem in self._put_instance(each, wanted[each.id])
        )

    def _wanted(self, instance: Instance) -> list[tuple[str, str, str]]:
        (port,) = instance.ports
        mac = port.mac or self._mac(instance.id)
        return [(str(port.network), mac, str(address)) for address in port.addresses]

    def _leases_of(self, instance_id: str) -> list[tuple[str, str, str]]:
        return self._leases.setdefault(instance_id, [])

    def _put_network(self, network: Network) -> None:
        assert isinstance(network.listener, BridgeListener)
        if self._networks.get(network.id) == network:
            return
        self._networks[network.id] = network
        mtu = "" if network.mtu is None else f"<mtu size='{network.mtu}'/>"
        leases = (lease for found in self._leases.values() for lease in found)
        hosts = "".join(_host(mac, where) for name, mac, where in leases if name == network.id)
        dhcp = f"<dhcp><range start='10.0.0.100' end='10.0.0.200'/>{hosts}</dhcp>"
        text = (
            f"<network><name>{network.id}</name><uuid>{uuid_of(network.id)}</uuid>"
            f"<forward mode='nat'/><bridge name='{network.listener.bridge}'/>{mtu}"
            f"<ip address='{_GATEWAY}' netmask='255.255.255.0'>{dhcp}</ip></network>"
        )
        made = self._libvirtd.connection.networkDefineXML(text)
        if made.isActive():
            made.destroy()
        if network.id == _SERVED:
            made.create()

    def _put_instance(
        self, instance: Instance, wanted: list[tuple[str, str, str]]
    ) -> tuple[Problem, ...]:
        before = list(self._leases_of(instance.id))
        known = [lease for found in self._leases.values() for lease in found]
        added: list[tuple[str, str, str]] = []
        try:
            for lease in wanted:
                if lease not in known:
                    self._update(lease, _ADD)
                    self._leases_of(instance.id).append(lease)
                    added.append(lease)
        except self._error as error:
            self._release(instance.id, added)
            return (Problem(f"instances.{instance.id}", str(error)),)
        (port,) = instance.ports
        place = (f"network={port.network}", port.mac or self._mac(instance.id))
        self._libvirtd.connection.defineXML(
            domain_xml(instance.id, [place], metadata_xml(instance))
        )
        self._release(instance.id, [lease for lease in before if lease not in wanted])
        return ()

    def _release(self, instance_id: str, leases: Iterable[tuple[str, str, str]]) -> None:
        for lease in leases:
            self._update(lease, _DELETE)
            self._leases_of(instance_id).remove(lease)

    def _update(self, lease: tuple[str, str, str], command: str) -> None:
        library = importlib.import_module("libvirt")
        name, mac, address = lease
        network = self._libvirtd.connection.networkLookupByName(name)
        where = library.VIR_NETWORK_UPDATE_AFFECT_CONFIG
        if network.isActive():
            where |= library.VIR_NETWORK_UPDATE_AFFECT_LIVE
        network.update(
            getattr(library, f"VIR_NETWORK_UPDATE_COMMAND_{command}"),
            library.VIR_NETWORK_SECTION_IP_DHCP_HOST,
            -1,
            _host(mac, address),
            where,
        )

    def _mac(self, instance_id: str) -> MacAddress:
        made = MacAddress(f"52:54:01:00:00:{len(self._made_up):02x}")
        return self._made_up.setdefault(instance_id, made)

    @property
    def _error(self) -> type[Exception]:
        error: type[Exception] = importlib.import_module("libvirt").libvirtError
        return error


def _host(mac: str, address: str) -> str:
    return f"<host mac='{mac}' ip='{address}'/>"


class _WithoutMadeUp:
    """The source, with the MACs that the suite does not know of taken out of what it tells."""

    def __init__(self, source: LibvirtSource, made_up: dict[str, MacAddress]) -> None:
        self._source = source
        self._made_up = made_up

    @property
    def name(self) -> str:
        return self._source.name

    def origin_of_port(self, instance: InstanceId, number: int) -> Origin | None:
        return self._source.origin_of_port(instance, number)

    async def run(self, publish: Publish) -> None:
        def rewritten(observation: Observation) -> None:
            reported = {key: self._rewrite(each) for key, each in observation.instances.items()}
            publish(replace(observation, instances=reported))

        await self._source.run(rewritten)

    def _rewrite(self, instance: Instance) -> Instance:
        made_up = set(self._made_up.values())
        ports = (replace(p, mac=None) if p.mac in made_up else p for p in instance.ports)
        return replace(instance, ports=tuple(ports))
