"""What a genuine libvirtd tells, and does not tell, of its domains and networks."""

import asyncio
import base64
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from imdsproxy.errors import NotFound, SourceUnavailable
from imdsproxy.model.entities import BridgeListener, InstanceId, MacAddress, Network, NetworkId
from imdsproxy.sources.libvirt.source import LibvirtClient, LibvirtEvents, read_domain
from imdsproxy.sources.libvirt.xml import METADATA_URI
from support.libvirt_backing import define_domain, domain_xml, libvirt_source, uuid_of
from support.libvirt_daemon import Libvirtd
from support.source_runs import Heard, running

pytestmark = pytest.mark.root

MAC = "52:54:00:00:00:05"
SECOND_MAC = "52:54:00:00:00:06"
LEAST_LEAK = 3
"""Of a file each time; what one connection leaves may be closed by the event loop of the next."""
_BY_EVENTS_ALONE_S = 3600
ISOLATED = "<network><name>inside</name><bridge name='imdst0'/></network>"
NAT = (
    "<network><name>nat</name><forward mode='nat'/><bridge name='imdst1'/>"
    "<ip address='10.7.0.1' netmask='255.255.255.0'>"
    "<dhcp><range start='10.7.0.100' end='10.7.0.200'/></dhcp></ip></network>"
)


@pytest.fixture(autouse=True)
def _cleared(libvirtd: Libvirtd) -> Iterator[None]:
    yield
    libvirtd.start()
    libvirtd.clear()


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def library() -> Any:
    return importlib.import_module("libvirt")


def start_network(libvirtd: Libvirtd, text: str) -> Any:
    network = libvirtd.connection.networkDefineXML(text)
    network.create()
    return network


def macs(heard: Heard, name: str = "a") -> list[MacAddress | None]:
    instance = heard.inventory.instances.get(InstanceId(uuid_of(name)))
    return [] if instance is None else [each.mac for each in instance.ports]


async def test_networks_are_reported_while_they_run_and_metadata_once_it_is_set_byte_for_byte(
    libvirtd: Libvirtd,
) -> None:
    payload = bytes(range(256)) * 100
    encoded = base64.encodebytes(payload).decode()
    async with running(libvirt_source(libvirtd, _BY_EVENTS_ALONE_S)) as heard:
        inside = await asyncio.to_thread(start_network, libvirtd, ISOLATED)
        await asyncio.to_thread(start_network, libvirtd, NAT)
        await heard.until(lambda each: len(each.inventory.networks) == 2)
        assert heard.inventory.networks[NetworkId("inside")] == Network(
            NetworkId("inside"), BridgeListener("imdst0")
        )
        nat = heard.inventory.networks[NetworkId("nat")]
        assert nat.listener == BridgeListener("imdst1")
        assert [str(each.cidr) for each in nat.subnets] == ["10.7.0.0/24"]
        domain = await asyncio.to_thread(
            define_domain, libvirtd, "a", ("network=inside", MAC), inside=""
        )
        await heard.until(macs)
        await asyncio.to_thread(
            domain.setMetadata,
            library().VIR_DOMAIN_METADATA_ELEMENT,
            f"<instance><hostname>www</hostname><user-data encoding='base64'>{encoded}</user-data></instance>",
            "imds",
            METADATA_URI,
            library().VIR_DOMAIN_AFFECT_CONFIG,
        )
        identity = InstanceId(uuid_of("a"))
        await heard.until(lambda each: each.inventory.instances[identity].hostname == "www")
        assert heard.inventory.instances[identity].user_data == payload
        await asyncio.to_thread(inside.destroy)
        await heard.until(lambda each: set(each.inventory.networks) == {"nat"})
        assert not heard.last.problems
        assert not list(heard.inventory.stranded())


async def test_an_interface_that_is_plugged_into_a_running_guest_is_reported(
    libvirtd: Libvirtd,
) -> None:
    await asyncio.to_thread(start_network, libvirtd, ISOLATED)
    plug = (
        "<interface type='network'><source network='inside'/>"
        f"<mac address='{SECOND_MAC}'/><model type='virtio'/></interface>"
    )
    async with running(libvirt_source(libvirtd, _BY_EVENTS_ALONE_S)) as heard:
        # Transient and paused: what runs is all that there is of it.
        domain = await asyncio.to_thread(
            libvirtd.connection.createXML,
            domain_xml("a", [("network=inside", MAC)]),
            library().VIR_DOMAIN_START_PAUSED,
        )
        await heard.until(lambda each: macs(each) == [MAC])
        await asyncio.to_thread(domain.attachDevice, plug)
        await heard.until(lambda each: macs(each) == [MAC, SECOND_MAC])
        await asyncio.to_thread(domain.destroy)
        await heard.until(lambda each: not macs(each))


async def test_a_static_host_of_a_running_network_is_seen_though_libvirt_has_no_event(
    libvirtd: Libvirtd,
) -> None:
    nat = await asyncio.to_thread(start_network, libvirtd, NAT)
    await asyncio.to_thread(define_domain, libvirtd, "a", ("network=nat", MAC), inside="")

    def add_host() -> None:
        nat.update(
            library().VIR_NETWORK_UPDATE_COMMAND_ADD_LAST,
            library().VIR_NETWORK_SECTION_IP_DHCP_HOST,
            -1,
            f"<host mac='{MAC}' ip='10.7.0.5'/>",
            library().VIR_NETWORK_UPDATE_AFFECT_LIVE,
        )

    async with running(libvirt_source(libvirtd)) as heard:
        assert "nat/10.7.0.5" not in heard.owners
        await asyncio.to_thread(add_host)
        await heard.until(lambda each: each.owners.get("nat/10.7.0.5") == uuid_of("a"))


async def test_what_was_known_stays_while_libvirtd_is_down_and_changes_when_it_is_back(
    libvirtd: Libvirtd,
) -> None:
    await asyncio.to_thread(start_network, libvirtd, ISOLATED)
    await asyncio.to_thread(define_domain, libvirtd, "a", ("network=inside", MAC), inside="")
    async with running(libvirt_source(libvirtd, _BY_EVENTS_ALONE_S)) as heard:
        await asyncio.to_thread(libvirtd.stop)
        await heard.until(lambda each: not each.last.in_sync)
        assert macs(heard) == [MAC]
        assert set(heard.inventory.networks) == {"inside"}
        assert any(problem.field == "libvirt" for problem in heard.last.problems)
        await asyncio.to_thread(libvirtd.start)
        await heard.until(lambda each: each.last.in_sync)
        assert not heard.last.problems
        # Events are heard on the new connection.
        await asyncio.to_thread(
            define_domain, libvirtd, "a", ("network=inside", SECOND_MAC), inside=""
        )
        await heard.until(lambda each: macs(each) == [SECOND_MAC])


async def test_connections_are_closed_for_good_lost_ones_too(libvirtd: Libvirtd) -> None:
    client = LibvirtClient(libvirtd.uri)
    files = []
    for lost in (False, False, False, True, True, True):
        events = LibvirtEvents()
        await client.connect(events)
        if lost:
            await asyncio.to_thread(libvirtd.stop)
            while events.lost is None:
                events.arrived.clear()
                await asyncio.wait_for(events.arrived.wait(), 10)
            with pytest.raises(SourceUnavailable):
                await client.domains()
        else:
            await client.domains()
        await client.close()
        await asyncio.to_thread(libvirtd.start)
        await asyncio.to_thread(libvirtd.disconnect)
        files.append(open_files())
    assert files[-1] < files[0] + LEAST_LEAK


async def test_nothing_can_be_changed_by_the_sources_connection(libvirtd: Libvirtd) -> None:
    client = LibvirtClient(libvirtd.uri)
    await client.connect(LibvirtEvents())
    try:
        with pytest.raises(SourceUnavailable, match="read only"):
            await client._call(lambda: client._connection.defineXML(domain_xml("a", [])))
    finally:
        await client.close()


async def test_one_domain_is_read_once_by_its_name_or_uuid(libvirtd: Libvirtd) -> None:
    def read() -> None:
        libvirtd.connection.networkDefineXML(ISOLATED)
        define_domain(
            libvirtd, "a", ("network=inside", MAC), inside="<imds:hostname>x</imds:hostname>"
        )
        domain, networks = read_domain(libvirtd.uri, "a")
        assert domain.keys == {"hostname": "x"}
        assert not networks["inside"].active
        assert read_domain(libvirtd.uri, uuid_of("a"))[0] == domain
        with pytest.raises(NotFound, match="no domain b"):
            read_domain(libvirtd.uri, "b")
        with pytest.raises(SourceUnavailable, match="socket"):
            read_domain("qemu+unix:///system?socket=/nonexistent", "a")

    await asyncio.to_thread(read)
