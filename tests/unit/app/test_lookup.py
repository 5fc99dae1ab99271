"""Who an unknown address is, with the neighbour table as it may be."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from ipaddress import IPv4Address, IPv6Address

import pytest

from imdsproxy.app.lookup import Lookup
from imdsproxy.app.tickets import Tickets
from imdsproxy.core.identity import Learned
from imdsproxy.core.inventory import AddressKey, Inventory, Observation
from imdsproxy.core.model import (
    Instance,
    InstanceId,
    IpAddress,
    MacAddress,
    NamespaceListener,
    Network,
    NetworkId,
    Port,
)
from imdsproxy.errors import HostRefused
from imdsproxy.serving.resolver import Contested, Known, Missing

_RED = NetworkId("red")
_MAC = MacAddress("02:00:00:00:00:05")
_PRIVATE: AddressKey = (_RED, IPv6Address("fe80::1234"))


class _Clock:
    def __init__(self) -> None:
        self.time = 100.0

    def monotonic(self) -> float:
        return self.time

    def now(self) -> datetime:
        return datetime.fromtimestamp(self.time, UTC)


class _Neighbours:
    def __init__(self) -> None:
        self.mac: MacAddress | None = None
        self.broken = False
        self.asked = 0

    async def neighbour(self, network: Network, address: IpAddress) -> MacAddress | None:
        del network, address
        self.asked += 1
        if self.broken:
            raise HostRefused("no such namespace")
        return self.mac


class _Records:
    """As much of the record loop as a look-up uses; everything is in force at once."""

    def __init__(self) -> None:
        self.learned: dict[AddressKey, Learned] = {}
        self.tickets = Tickets()

    def learn(self, key: AddressKey, learned: Learned) -> int:
        self.learned[key] = learned
        return 0

    def forget(self, key: AddressKey) -> int:
        self.learned.pop(key, None)
        return 0


class Rig:
    def __init__(self, *instances: Instance, in_sync: bool = True) -> None:
        self.inventory = Inventory(["a"])
        self.clock = _Clock()
        self.neighbours = _Neighbours()
        self.records = _Records()
        self.say(*instances, in_sync=in_sync)
        self.lookup = Lookup(
            self.inventory,
            self.records,  # type: ignore[arg-type]  # the part that is used
            self.neighbours,
            self.clock,
            lambda: 30.0,
        )

    def say(self, *instances: Instance, in_sync: bool = True) -> None:
        network = Network(_RED, NamespaceListener("red"))
        self.inventory.observe(
            Observation(
                "a",
                full=True,
                networks={_RED: network},
                instances={one.id: one for one in instances},
                in_sync=in_sync,
            )
        )


def _web(mac: MacAddress | None = _MAC, name: str = "web") -> Instance:
    port = Port(_RED, mac, (IPv4Address("10.0.0.5"),))
    return Instance(InstanceId(name), name, name, ports=(port,))


async def test_an_address_of_a_record_needs_no_neighbour_table() -> None:
    rig = Rig(_web())
    assert await rig.lookup.look((_RED, IPv4Address("10.0.0.5"))) == Known(InstanceId("web"))
    assert rig.neighbours.asked == 0
    assert rig.records.learned == {}


async def test_a_private_link_local_address_is_known_by_its_mac_and_kept_for_a_while() -> None:
    rig = Rig(_web())
    rig.neighbours.mac = _MAC
    assert await rig.lookup.look(_PRIVATE) == Known(InstanceId("web"))
    assert rig.records.learned == {_PRIVATE: Learned(InstanceId("web"), 130.0)}


@pytest.mark.parametrize("mac", [None, MacAddress("02:00:00:00:00:99")])
async def test_an_unknown_mac_is_nobody(mac: MacAddress | None) -> None:
    rig = Rig(_web())
    rig.neighbours.mac = mac
    assert await rig.lookup.look(_PRIVATE) == Missing(in_sync=True)
    assert rig.records.learned == {}


async def test_an_ipv4_address_is_never_looked_for_in_the_neighbour_table() -> None:
    rig = Rig(_web())
    rig.neighbours.mac = _MAC
    assert await rig.lookup.look((_RED, IPv4Address("10.0.0.99"))) == Missing(in_sync=True)
    assert rig.neighbours.asked == 0


async def test_a_table_that_cannot_be_read_makes_nobody_known() -> None:
    rig = Rig(_web())
    rig.neighbours.broken = True
    assert await rig.lookup.look(_PRIVATE) == Missing(in_sync=True)


async def test_a_mac_of_two_instances_is_contested() -> None:
    other = Instance(
        InstanceId("db"), "db", "db", ports=(Port(_RED, _MAC, (IPv4Address("10.0.0.6"),)),)
    )
    rig = Rig(_web(), other)
    rig.neighbours.mac = _MAC
    assert await rig.lookup.look(_PRIVATE) == Contested()


async def test_an_unknown_network_and_a_source_out_of_sync_are_told_apart() -> None:
    assert await Rig(in_sync=False).lookup.look(_PRIVATE) == Missing(in_sync=False)
    nowhere = (NetworkId("blue"), IPv4Address("10.0.0.5"))
    assert await Rig(_web()).lookup.look(nowhere) == Missing(in_sync=True)


async def test_what_was_learned_is_looked_at_again_when_its_time_is_over() -> None:
    rig = Rig(_web())
    rig.neighbours.mac = _MAC
    await rig.lookup.look(_PRIVATE)
    asked = rig.neighbours.asked
    await rig.lookup.review()
    assert rig.neighbours.asked == asked
    rig.clock.time = 131
    await rig.lookup.review()
    assert rig.records.learned == {_PRIVATE: Learned(InstanceId("web"), 161.0)}


@pytest.mark.parametrize("change", ["another-mac", "no-mac", "instance-gone"])
async def test_what_is_no_longer_so_is_forgotten(change: str) -> None:
    rig = Rig(_web())
    rig.neighbours.mac = _MAC
    await rig.lookup.look(_PRIVATE)
    if change == "another-mac":
        rig.neighbours.mac = MacAddress("02:00:00:00:00:77")
    elif change == "no-mac":
        rig.neighbours.mac = None
    else:
        rig.say()
    rig.clock.time = 131
    await rig.lookup.review()
    assert rig.records.learned == {}


async def test_a_ticket_waits_for_its_number() -> None:
    tickets = Tickets()
    first, second = tickets.take(), tickets.take()
    waiting = asyncio.create_task(tickets.wait(second))
    await tickets.close(first)
    await asyncio.sleep(0)
    assert not waiting.done()
    assert not tickets.settled
    await tickets.close(second)
    await waiting
    await tickets.wait(first)
    assert tickets.settled
