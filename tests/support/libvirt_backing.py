"""What the source libvirt reads: domains and networks of a genuine libvirtd, or in memory."""

import platform
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from imdsproxy.config.sources import LibvirtSourceSettings
from imdsproxy.errors import Problem, SourceUnavailable
from imdsproxy.model.entities import BridgeListener, Instance, InstanceId, MacAddress, Network
from imdsproxy.model.records import Refused
from imdsproxy.reconcile.reconciler import Reconciler
from imdsproxy.sources.libvirt.source import LibvirtClient, LibvirtEvents, LibvirtSource
from imdsproxy.sources.libvirt.xml import (
    METADATA_URI,
    Domain,
    LibvirtNetwork,
    parse_domain,
    parse_libvirt_network,
)
from support.libvirt_daemon import Libvirtd
from support.source_runs import WholeRecords


def libvirt_source(libvirtd: Libvirtd, reread_s: float = 0.2) -> LibvirtSource:
    """A source that looks often."""
    settings = LibvirtSourceSettings.model_construct(reread_s=reread_s)
    connections = Reconciler("libvirt", "", 0.05, 0.2, retried=SourceUnavailable)
    return LibvirtSource(LibvirtClient(libvirtd.uri), settings, connections)


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
        f"<os><type arch='{platform.machine()}'>hvm</type></os><features><acpi/></features>"
        f"<devices>{plugged}</devices></domain>"
    )


def define_domain(libvirtd: Libvirtd, name: str, *interfaces: tuple[str, str], inside: str) -> Any:
    """Define a domain whose element holds `inside`."""
    text = domain_xml(name, interfaces, _element(inside))
    return libvirtd.connection.defineXML(text)


class FakeLibvirt(LibvirtClient):
    """A client of a libvirt whose domains and networks are `xml` (by UUID) and `network_xml` (by name)."""

    def __init__(self) -> None:
        self.xml: dict[str, str] = {}
        self.network_xml: dict[str, str] = {}
        self.failure: str | None = None
        self.connections = 0
        self.open = False
        self.events = LibvirtEvents()

    async def connect(self, events: LibvirtEvents) -> None:
        self.connections += 1
        self._check()
        self.open = True
        self.events = events

    async def domains(self) -> Mapping[str, Domain | Refused]:
        self._check()
        return {uuid: parse_domain(text) for uuid, text in self.xml.items()}

    async def domain(self, uuid: str) -> Domain | Refused | None:
        return (await self.domains()).get(uuid)

    async def networks(self) -> tuple[LibvirtNetwork | Refused, ...]:
        self._check()
        return tuple(parse_libvirt_network(text, active=True) for text in self.network_xml.values())

    async def close(self) -> None:
        self.open = False

    def lose(self, reason: str) -> None:
        self.failure = reason
        self.events.lose(reason)

    def _check(self) -> None:
        if self.failure is not None:
            raise SourceUnavailable(self.failure)


class LibvirtBacking(WholeRecords):
    """Domains whose element has the record's id, addresses as static hosts of their networks."""

    def __init__(self, _directory: Path) -> None:
        self._libvirt = FakeLibvirt()
        self._networks: dict[str, Network] = {}
        self._hosts: dict[str, list[tuple[str, str]]] = {}

    def source(self) -> LibvirtSource:
        return LibvirtSource(self._libvirt, LibvirtSourceSettings())

    async def put(
        self, networks: Iterable[Network] = (), instances: Iterable[Instance] = ()
    ) -> tuple[Problem, ...]:
        self._networks.update({each.id: each for each in networks})
        for each in instances:
            (port,) = each.ports
            assert port.mac is not None
            self._hosts[each.id] = [
                (port.network, f"<host mac='{port.mac}' ip='{address}'/>")
                for address in port.addresses
            ]
            hostname = f"<imds:hostname>{escape(each.hostname)}</imds:hostname>"
            place = f"network={port.network}", port.mac
            self._define(each.id, _element(hostname, each.id), place)
        self._define_networks()
        return ()

    async def remove_network(self, network_id: str) -> None:
        del self._networks[network_id]
        self._define_networks()

    async def remove_instance(self, instance_id: str) -> None:
        self._hosts.pop(instance_id, None)
        del self._libvirt.xml[uuid_of(instance_id)]
        self._libvirt.events.change(uuid_of(instance_id))

    async def spoil(self, instance_id: str) -> str:
        self._define(instance_id, _element("<imds:key/>", instance_id))
        return "instance"

    async def claim_twice(self, victim: Instance, thief_id: str) -> tuple[Problem, ...]:
        # With a MAC of its own: libvirt has one address for a MAC.
        port = replace(victim.ports[0], mac=MacAddress("52:54:00:00:00:99"))
        thief = replace(victim, id=InstanceId(thief_id), name=thief_id, ports=(port,))
        return await self.put([], [thief])

    def _define(self, name: str, metadata: str, *interfaces: tuple[str, str]) -> None:
        self._libvirt.xml[uuid_of(name)] = domain_xml(name, interfaces, metadata)
        self._libvirt.events.change(uuid_of(name))

    def _define_networks(self) -> None:
        self._libvirt.network_xml = {
            each.id: self._network_xml(each) for each in self._networks.values()
        }
        self._libvirt.events.change()

    def _network_xml(self, network: Network) -> str:
        assert isinstance(network.listener, BridgeListener)
        mtu = "" if network.mtu is None else f"<mtu size='{network.mtu}'/>"
        hosts = (text for each in self._hosts.values() for name, text in each if name == network.id)
        return (
            f"<network><name>{network.id}</name><uuid>{uuid_of(network.id)}</uuid>"
            f"<bridge name='{network.listener.bridge}'/>{mtu}"
            f"<ip><dhcp>{''.join(hosts)}</dhcp></ip></network>"
        )
