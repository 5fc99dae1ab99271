"""MAC filters as networks come and go, whatever the kernel says."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import pytest

from imdsproxy.anti_spoofing.kernel import table_journal
from imdsproxy.anti_spoofing.mac_filters import MacFilters
from imdsproxy.anti_spoofing.plan import ANY_MAC
from imdsproxy.core.endpoints import Endpoint
from imdsproxy.core.hostnames import Naming
from imdsproxy.core.hoststate import NamespaceRef, ObservedHost
from imdsproxy.core.inventory import Inventory
from imdsproxy.core.model import METADATA_IPV4, MacAddress, NetworkId
from imdsproxy.core.observation import AddressKey
from imdsproxy.errors import HostRefused, Problem
from support.fake_mac_filters import FakeMacFilters
from support.hand_clock import HandClock
from support.record_builders import full, instance, key, network

_N1 = NetworkId("n1")
_MAC, _OTHER = MacAddress("52:54:00:00:00:01"), MacAddress("52:54:00:00:00:02")
_KEY = key("n1", "10.0.0.5")


class Rig:
    def __init__(self, directory: Path, kernel: FakeMacFilters | None = None) -> None:
        self.directory, self.kernel = directory, kernel or FakeMacFilters()
        self.inventory = Inventory(["file"])
        self.changed: list[frozenset[NetworkId]] = []
        self.missing: list[NetworkId] = []
        self.clock = HandClock()
        self.filters = MacFilters(
            self.kernel,
            self.inventory,
            Naming(),
            table_journal(directory / "gates.json"),
            self.clock,
            self.changed.append,
            self.missing.append,
        )

    def say(self, *macs: MacAddress | None, check: bool = True, in_sync: bool = True) -> None:
        records = [
            instance(f"i{number}", f"10.0.0.{number + 5}", mac=mac)
            for number, mac in enumerate(macs)
        ]
        told = full("file", [network("n1", mac_check=check)], records)
        self.inventory.observe(told)
        if not in_sync:
            self.inventory.observe(type(told)("file", in_sync=False))

    async def round(
        self,
        *,
        inode: int = 7,
        sweep: bool = True,
        listening: bool = True,
        running: bool = True,
    ) -> None:
        """The listener loop's: with one device of the network, if it listens there."""
        place = NamespaceRef("ns", inode)
        endpoints = [Endpoint(_N1, METADATA_IPV4, 80, "eth0", place, 2)] * listening
        plan = await self.filters.open(
            self.inventory.networks, endpoints, ObservedHost(), running=running
        )
        await self.filters.settle(plan, sweep=sweep)

    async def up(self) -> Self:
        """With a filter that lets the instance's pair through."""
        await self.filters.grant(_one(_MAC))
        await self.round()
        return self

    def later(self, *macs: MacAddress | None, **options: bool) -> Rig:
        """Another process, after this one, on the same host."""
        other = Rig(self.directory, self.kernel)
        other.say(*macs, **options)
        return other


def _one(mac: MacAddress | None) -> dict[AddressKey, MacAddress | None]:
    return {_KEY: mac}


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    """One with an instance that has a MAC."""
    made = Rig(tmp_path)
    made.say(_MAC)
    return made


async def test_a_filter_is_created_before_haproxy_listens_and_filled_after(rig: Rig) -> None:
    rig.filters.preload(_one(_MAC))
    await rig.round()
    assert rig.kernel.log == ["open n1", "fill n1"]
    assert rig.kernel.tables == {_N1: {_KEY[1]: _MAC}}
    await rig.round()
    assert rig.kernel.log == ["open n1", "fill n1"]


async def test_connections_may_be_open_where_haproxy_listened_before(rig: Rig) -> None:
    await rig.round(running=False)
    assert rig.kernel.busy == [frozenset()]
    await rig.round(inode=8)
    assert rig.kernel.busy[1:] == [frozenset({_N1})]
    rig.kernel.lose(_N1)
    await rig.later(_MAC).round(running=True)
    assert rig.kernel.busy[2:] == [frozenset({_N1})]


async def test_an_address_without_owner_is_withdrawn_after_a_while(rig: Rig) -> None:
    await rig.up()
    await rig.filters.withdraw(_one(None))
    rig.clock.time += 29
    await rig.filters.expire()
    assert rig.filters.granted(_KEY) == _MAC
    # It comes back: nothing was to go.
    await rig.filters.withdraw(_one(_MAC))
    rig.clock.time += 100
    await rig.filters.expire()
    assert rig.filters.granted(_KEY) == _MAC
    await rig.filters.withdraw(_one(None))
    rig.clock.time += 31
    await rig.filters.expire()
    assert rig.kernel.tables == {_N1: {}}
    assert list(rig.filters.keys()) == []


async def test_a_later_process_takes_over_what_is_there_and_sweeps_once_sources_are_in_sync(
    rig: Rig,
) -> None:
    kernel = (await rig.up()).kernel
    second = rig.later(in_sync=False)
    kernel.log.clear()
    for _ in range(2):
        await second.round(sweep=second.inventory.in_sync)
        assert (kernel.log, kernel.tables) == ([], {_N1: {_KEY[1]: _MAC}})
        assert second.filters.granted(_KEY) == _MAC
        assert second.filters.is_up(_N1)
        # In sync and without a MAC it stays: its guests' connections would end.
        second.say()
    third = rig.later()
    await third.round(listening=False, sweep=False)
    assert kernel.tables
    await third.round(listening=False)
    assert kernel.tables == {}


async def test_one_that_has_to_start_haproxy_lets_through_what_it_knows(rig: Rig) -> None:
    first = rig
    kept = key("n1", "10.0.0.9")
    await first.filters.grant({_KEY: _MAC, kept: _OTHER})
    await first.round()
    second = first.later(_OTHER)
    second.filters.preload(_one(_OTHER))
    await second.round()
    assert first.kernel.tables == {_N1: {_KEY[1]: _OTHER}}
    # Until all sources are in sync, pairs from before stay.
    third = first.later(_MAC, in_sync=False)
    first.kernel.tables[_N1][kept[1]] = _OTHER
    third.filters.preload(_one(_MAC))
    # What is in sync by now was not when the pairs were planned.
    third.say(_MAC)
    await third.round()
    assert first.kernel.tables == {_N1: {_KEY[1]: _MAC, kept[1]: _OTHER}}


@pytest.mark.parametrize("check", [False, True])
async def test_a_filter_that_is_not_needed_is_removed(rig: Rig, *, check: bool) -> None:
    await rig.round()
    rig.say(_MAC, check=check)
    await rig.round(listening=not check)
    assert rig.kernel.tables == {}
    assert (rig.directory / "gates.json").read_text() == "{}"


async def test_a_kernel_that_refuses_leaves_no_guest_verified_and_is_reported(rig: Rig) -> None:
    rig.kernel.refuse = "no such family"
    await rig.round()
    assert not rig.filters.is_up(_N1)
    assert rig.filters.plan.verified == ()
    assert rig.filters.refused == {_N1: Problem("networks.n1", "no such family", "do something")}
    assert not await rig.filters.bind_answers(_KEY, 4711, _MAC)
    assert await rig.filters.sender(_KEY, 4711) is None
    rig.kernel.refuse = ""
    await rig.round()
    assert not rig.filters.refused
    assert rig.filters.is_up(_N1)


async def test_a_filter_that_was_removed_is_created_again_with_its_pairs(rig: Rig) -> None:
    await rig.up()
    rig.kernel.lose(_N1)
    rig.filters.lost(Naming().link(_N1))
    assert rig.missing == [_N1]
    await rig.round()
    assert rig.kernel.tables == {_N1: {_KEY[1]: _MAC}}
    # The kernel reports our own changes as well.
    rig.kernel.log.clear()
    rig.filters.lost(Naming().link(_N1))
    await rig.round()
    assert rig.kernel.log == []
    # Without an event it is noticed at the next change.
    rig.kernel.lose(_N1)
    await rig.filters.withdraw(_one(_OTHER))
    assert not rig.filters.is_up(_N1)
    await rig.filters.grant(_one(_OTHER))
    await rig.round()
    assert rig.kernel.tables == {_N1: {_KEY[1]: _OTHER}}


async def test_a_device_created_again_has_a_filter_of_its_own(rig: Rig) -> None:
    await rig.up()
    await rig.round(inode=8)
    assert rig.kernel.log == ["open n1", "fill n1", "open n1", "fill n1"]
    assert rig.kernel.tables == {_N1: {_KEY[1]: _MAC}}
    assert rig.filters.network_at(NamespaceRef("ns", 8), 2) == _N1
    assert rig.filters.network_at(NamespaceRef("ns", 7), 2) is None


async def test_where_macs_are_not_checked_yet_haproxy_does_not_know_an_address_with_a_mac(
    rig: Rig,
) -> None:
    other = key("n1", "10.0.0.6")
    for macs, withheld in (((None,), {other}), ((None, _MAC), set())):
        rig.say(*macs)
        await rig.round()
        assert rig.filters.is_plain(_N1) is bool(withheld)
        assert rig.filters.withheld({_KEY: ANY_MAC, other: _MAC}) == withheld
    assert rig.changed == [frozenset({_N1})]


async def test_a_journal_that_cannot_be_read_is_an_error(rig: Rig) -> None:
    (rig.directory / "gates.json").write_text("[")
    with pytest.raises(HostRefused, match=r"gates\.json"):
        await rig.round()
