"""Who an unknown address is, with the neighbour table as it may be."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv6Address

import pytest

from imdsproxy.anti_spoofing.mac_filters import MacFilters
from imdsproxy.anti_spoofing.plan import LEARNED_PER_MAC, plan_pair
from imdsproxy.app.lookup import Lookup
from imdsproxy.app.tickets import Tickets
from imdsproxy.core.identity import Denial, Learned
from imdsproxy.core.inventory import Inventory
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
from imdsproxy.core.observation import AddressKey, Observation
from imdsproxy.core.wire import EmbeddedRecord
from imdsproxy.errors import HostRefused
from imdsproxy.serving.resolver import Outcome
from support.hand_clock import HandClock

_RED = NetworkId("red")
_REVISION = "0123456789abcdef"
_WEB = EmbeddedRecord(InstanceId("web"), _REVISION)
_MAC = MacAddress("02:00:00:00:00:05")
_PRIVATE: AddressKey = (_RED, IPv6Address("fe80::1234"))


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


class _Pairs(MacFilters):
    """Filters that follow the records at once."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.up = True
        self.plain = False
        self.told: list[tuple[AddressKey, int, MacAddress]] = []
        self.senders: dict[tuple[AddressKey, int], MacAddress] = {}
        self.on_tell: Callable[[], None] = lambda: None

    def is_plain(self, network: NetworkId) -> bool:
        del network
        return self.plain

    def is_up(self, network: NetworkId) -> bool:
        del network
        return self.up

    def granted(self, key: AddressKey) -> MacAddress | None:
        return plan_pair(self.rig.inventory, key, self.rig.records.learned)

    def keys(self) -> Iterator[AddressKey]:
        return iter(())

    async def sender(self, key: AddressKey, port: int) -> MacAddress | None:
        return self.senders.get((key, port))

    async def bind_answers(self, key: AddressKey, port: int, mac: MacAddress) -> bool:
        self.told.append((key, port, mac))
        self.on_tell()
        return True


class _Records:
    """As much of the record loop as a look-up uses; everything is in force at once."""

    def __init__(self) -> None:
        self.learned: dict[AddressKey, Learned] = {}
        self.tickets = Tickets()
        self.owner = "web"

    def learn(self, key: AddressKey, learned: Learned) -> int:
        self.learned[key] = learned
        return 0

    def forget(self, key: AddressKey) -> int:
        self.learned.pop(key, None)
        return 0

    def touch(self, key: AddressKey) -> int:
        del key
        return 0

    def planned(self, key: AddressKey) -> EmbeddedRecord:
        del key
        return EmbeddedRecord(InstanceId(self.owner), _REVISION)


class Rig:
    def __init__(self, *instances: Instance, in_sync: bool = True, mac_check: bool = False) -> None:
        self.mac_check = mac_check
        self.pairs = _Pairs(self)
        self.inventory = Inventory(["a"])
        self.clock = HandClock()
        self.neighbours = _Neighbours()
        self.records = _Records()
        self.say(*instances, in_sync=in_sync)
        self.lookup = Lookup(
            self.inventory,
            self.records,  # type: ignore[arg-type]  # the part that is used
            self.neighbours.neighbour,
            self.clock,
            lambda: 30.0,
            self.pairs,
        )

    def say(self, *instances: Instance, in_sync: bool = True) -> None:
        network = Network(_RED, NamespaceListener("red"), mac_check=self.mac_check)
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


_ASKED: AddressKey = (_RED, IPv4Address("10.0.0.5"))
_OTHER = MacAddress("02:00:00:00:00:99")


def _bare(mac: MacAddress = _MAC, name: str = "web") -> Instance:
    return Instance(InstanceId(name), name, name, ports=(Port(_RED, mac),))


_ALONE, _BARE, _NO_MAC = (_web(),), (_bare(),), (_web(None),)
_TWO = (_web(), _bare(name="db"))


@pytest.mark.parametrize(
    ("instances", "neighbour", "key", "expected"),
    [
        # By the record, without a look at the neighbour table.
        (_ALONE, _OTHER, _ASKED, _WEB),
        (_ALONE, _MAC, (_RED, IPv4Address("10.0.0.99")), Denial.UNKNOWN),
        (_ALONE, _MAC, (NetworkId("blue"), IPv4Address("10.0.0.5")), Denial.UNKNOWN),
        # A private link-local address is known by its MAC.
        (_ALONE, _MAC, _PRIVATE, _WEB),
        (_ALONE, _OTHER, _PRIVATE, Denial.UNKNOWN),
        (_ALONE, None, _PRIVATE, Denial.UNKNOWN),
        (_TWO, _MAC, _PRIVATE, Denial.CONFLICT),
        (None, None, _PRIVATE, Denial.UNAVAILABLE),
    ],
)
async def test_an_address_is_known_by_its_record_or_else_by_its_mac(
    instances: tuple[Instance, ...] | None,
    neighbour: MacAddress | None,
    key: AddressKey,
    expected: Outcome,
) -> None:
    rig = Rig(*(instances or ()), in_sync=instances is not None)
    rig.neighbours.mac = neighbour
    assert await rig.lookup.look(key) == expected
    assert rig.neighbours.asked == (1 if key == _PRIVATE else 0)
    learned = {_PRIVATE: Learned(InstanceId("web"), 130.0, mac=_MAC)}
    assert rig.records.learned == (learned if (key, expected) == (_PRIVATE, _WEB) else {})


@pytest.mark.parametrize(
    ("instances", "neighbour", "sender", "expected"),
    [
        (_ALONE, _MAC, None, _WEB),
        (_ALONE, _OTHER, None, Denial.MISMATCH),
        (_ALONE, None, None, Denial.MISMATCH),
        # The MAC that the connection came from counts, and not the neighbour table's.
        (_ALONE, _OTHER, _MAC, _WEB),
        # By its MAC alone, at whatever address.
        (_BARE, _MAC, None, _WEB),
        # Without a MAC in its record it is believed with any.
        (_NO_MAC, _OTHER, None, _WEB),
    ],
)
async def test_an_unverified_address_is_known_with_its_mac_and_no_other_reads_the_answer(
    instances: tuple[Instance, ...],
    neighbour: MacAddress | None,
    sender: MacAddress | None,
    expected: Outcome,
) -> None:
    rig = Rig(*instances, mac_check=True)
    rig.neighbours.mac = neighbour
    if sender is not None:
        rig.pairs.senders[_ASKED, 4711] = sender
    assert await rig.lookup.look(_ASKED, None, 4711) == expected
    bound = expected == _WEB and instances is not _NO_MAC
    assert rig.pairs.told == ([(_ASKED, 4711, _MAC)] if bound else [])
    learned = {_ASKED: Learned(InstanceId("web"), 130.0, mac=_MAC)}
    assert rig.records.learned == (learned if instances is _BARE else {})


async def test_a_table_that_cannot_be_read_makes_none_known() -> None:
    rig = Rig(_web())
    rig.neighbours.broken = True
    assert await rig.lookup.look(_PRIVATE) == Denial.UNKNOWN


async def test_what_was_learned_is_looked_at_again_when_its_time_is_over() -> None:
    rig = Rig(_web())
    rig.neighbours.mac = _MAC
    await rig.lookup.look(_PRIVATE)
    asked = rig.neighbours.asked
    await rig.lookup.review()
    assert rig.neighbours.asked == asked
    rig.clock.time = 131
    await rig.lookup.review()
    assert rig.records.learned == {_PRIVATE: Learned(InstanceId("web"), 161.0, mac=_MAC)}


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
    await tickets.close(second)
    await waiting
    await tickets.wait(first)


async def test_an_address_that_another_takes_meanwhile_never_gives_that_one_s_record() -> None:
    rig = Rig(_bare(), mac_check=True)
    rig.neighbours.mac = _MAC

    def take() -> None:
        rig.records.owner = "thief"

    rig.pairs.on_tell = take
    assert await rig.lookup.look(_ASKED, None, 4711) == Denial.UNAVAILABLE


async def test_what_is_told_of_needs_no_second_look() -> None:
    rig = Rig(_bare(), mac_check=True)
    rig.lookup.is_followed = lambda _: True
    rig.neighbours.mac = _MAC
    await rig.lookup.look(_ASKED, None, 4711)
    asked = rig.neighbours.asked
    rig.clock.time = 1e9
    await rig.lookup.review()
    assert rig.neighbours.asked == asked
    assert _ASKED in rig.records.learned


async def test_without_a_gate_nobody_with_a_mac_is_answered() -> None:
    rig = Rig(_web(), mac_check=True)
    rig.neighbours.mac = _MAC
    rig.pairs.up = False
    assert await rig.lookup.look(_ASKED, None, 4711) == Denial.UNAVAILABLE
    # Nor where HAProxy listens as if nobody looked at MACs.
    rig.pairs.plain = True
    assert await rig.lookup.look(_ASKED) == Denial.UNAVAILABLE


async def test_a_verified_guest_is_known_whatever_the_neighbour_table_has_by_now() -> None:
    rig = Rig(_web(), mac_check=True)
    rig.neighbours.mac = _OTHER
    assert await rig.lookup.look(_ASKED) == _WEB


async def test_an_address_follows_its_lease() -> None:
    rig = Rig(_bare(), _bare(_OTHER, "db"), mac_check=True)
    rig.neighbours.mac = _MAC
    await rig.lookup.look(_ASKED, None, 1)
    rig.lookup.on_neighbour(_ASKED, _OTHER)
    assert rig.records.learned[_ASKED] == Learned(InstanceId("db"), 130.0, mac=_OTHER)
    rig.lookup.on_neighbour(_ASKED, None)
    assert rig.records.learned == {}
    # Nobody is known there: what is told of it is of no account.
    rig.lookup.on_neighbour(_ASKED, _MAC)
    assert rig.records.learned == {}


async def test_one_mac_has_so_many_addresses_and_the_oldest_goes() -> None:
    rig = Rig(_bare(), mac_check=True)
    rig.neighbours.mac = _MAC
    keys = [(_RED, IPv4Address(f"10.0.1.{number}")) for number in range(LEARNED_PER_MAC + 1)]
    for key in keys:
        assert await rig.lookup.look(key, None, 1) == _WEB
    assert list(rig.records.learned) == keys[1:]
