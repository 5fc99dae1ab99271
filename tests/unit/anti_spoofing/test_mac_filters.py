"""MAC filters as networks come and go, whatever the kernel says."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from imdsproxy.anti_spoofing.kernel import TableJournal
from imdsproxy.anti_spoofing.mac_filters import MacFilters
from imdsproxy.anti_spoofing.plan import ANY_MAC
from imdsproxy.core.endpoints import Endpoint
from imdsproxy.core.hostnames import Naming
from imdsproxy.core.hoststate import NamespaceRef, ObservedHost
from imdsproxy.core.inventory import Inventory
from imdsproxy.core.model import METADATA_IPV4, MacAddress, NetworkId
from imdsproxy.core.observation import AddressKey
from imdsproxy.errors import HostRefused
from support.fake_mac_filters import FakeMacFilters
from support.hand_clock import HandClock
from support.record_builders import full, instance, key, network

_N1 = NetworkId("n1")
_MAC, _OTHER = MacAddress("52:54:00:00:00:01"), MacAddress("52:54:00:00:00:02")
_KEY = key("n1", "10.0.0.5")


class Rig:
    def __init__(self, directory: Path, kernel: FakeMacFilters | None = None) -> None:
        self.kernel = kernel or FakeMacFilters()
        self.inventory = Inventory(["file"])
        self.changed: list[frozenset[NetworkId]] = []
        self.missing: list[NetworkId] = []
        self.clock = HandClock()
        self.filters = MacFilters(
            self.kernel,
            self.inventory,
            Naming(),
            TableJournal(directory / "gates.json"),
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
        place = NamespaceRef("ns", inode)
        endpoints: Iterable[Endpoint] = [Endpoint(_N1, METADATA_IPV4, 80, "eth0", place, 2)]
        plan = await self.filters.open(
            self.inventory.networks,
            endpoints if listening else [],
            ObservedHost(),
            running=running,
        )
        await self.filters.settle(plan, sweep=sweep)


def _one(mac: MacAddress | None, at: AddressKey = _KEY) -> dict[AddressKey, MacAddress | None]:
    return {at: mac}


async def test_a_filter_is_created_before_haproxy_listens_and_filled_after(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.say(_MAC)
    rig.filters.preload(_one(_MAC))
    await rig.round()
    assert rig.kernel.log == ["open n1", "fill n1"]
    assert rig.kernel.tables == {_N1: {_KEY[1]: _MAC}}
    await rig.round()
    assert rig.kernel.log == ["open n1", "fill n1"]


async def test_connections_may_be_open_where_haproxy_listened_before(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.say(_MAC)
    await rig.round(running=False)
    assert rig.kernel.busy == [frozenset()]
    await rig.round(inode=8)
    assert rig.kernel.busy[1:] == [frozenset({_N1})]
    adopting = Rig(tmp_path)
    adopting.say(_MAC)
    await adopting.round(running=True)
    assert adopting.kernel.busy == [frozenset({_N1})]


async def test_an_address_with_another_mac_is_withdrawn_before_it_is_granted(
    tmp_path: Path,
) -> None:
    rig = Rig(tmp_path)
    rig.say(_MAC)
    await rig.filters.grant(_one(_MAC))
    await rig.round()
    await rig.filters.withdraw(_one(_OTHER))
    assert rig.kernel.tables == {_N1: {}}
    await rig.filters.grant(_one(_OTHER))
    assert rig.kernel.tables == {_N1: {_KEY[1]: _OTHER}}


async def test_an_address_without_owner_is_withdrawn_after_a_while(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.say(_MAC)
    await rig.filters.grant(_one(_MAC))
    await rig.round()
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


async def test_a_later_process_takes_over_what_is_there(tmp_path: Path) -> None:
    first = Rig(tmp_path)
    first.say(_MAC)
    await first.filters.grant(_one(_MAC))
    await first.round()
    second = Rig(tmp_path, first.kernel)
    second.say(_MAC)
    first.kernel.log.clear()
    await second.round()
    assert first.kernel.log == []
    assert second.filters.granted(_KEY) == _MAC
    assert second.filters.is_up(_N1)


async def test_one_that_has_to_start_haproxy_lets_through_what_it_knows(tmp_path: Path) -> None:
    first = Rig(tmp_path)
    first.say(_MAC)
    kept = key("n1", "10.0.0.9")
    await first.filters.grant({_KEY: _MAC, kept: _OTHER})
    await first.round()
    second = Rig(tmp_path, first.kernel)
    second.say(_OTHER)
    second.filters.preload(_one(_OTHER))
    await second.round()
    assert first.kernel.tables == {_N1: {_KEY[1]: _OTHER}}
    # Until all sources are in sync, pairs from before stay.
    third = Rig(tmp_path, first.kernel)
    first.kernel.tables[_N1][kept[1]] = _OTHER
    third.say(_MAC, in_sync=False)
    third.filters.preload(_one(_MAC))
    await third.round(sweep=False)
    assert first.kernel.tables == {_N1: {_KEY[1]: _MAC, kept[1]: _OTHER}}


async def test_no_filter_is_removed_before_all_sources_are_in_sync(tmp_path: Path) -> None:
    first = Rig(tmp_path)
    first.say(_MAC)
    await first.filters.grant(_one(_MAC))
    await first.round()
    second = Rig(tmp_path, first.kernel)
    second.say(in_sync=False)
    await second.round(sweep=False)
    assert first.kernel.tables == {_N1: {_KEY[1]: _MAC}}
    second.say()
    await second.round()
    # It stays while it is there: its guests' connections would end.
    assert _N1 in first.kernel.tables


@pytest.mark.parametrize("how", ["network-gone", "no-check", "not-listening"])
async def test_a_filter_that_is_not_needed_is_removed(tmp_path: Path, how: str) -> None:
    rig = Rig(tmp_path)
    rig.say(_MAC)
    await rig.round()
    if how == "no-check":
        rig.say(_MAC, check=False)
    await rig.round(listening=how == "no-check")
    assert rig.kernel.tables == {}
    assert (tmp_path / "gates.json").read_text() == "{}"


async def test_filters_of_an_earlier_process_are_removed(tmp_path: Path) -> None:
    first = Rig(tmp_path)
    first.say(_MAC)
    await first.round()
    second = Rig(tmp_path, first.kernel)
    await second.round(listening=False, sweep=False)
    assert first.kernel.tables
    await second.round(listening=False)
    assert first.kernel.tables == {}


async def test_a_kernel_that_refuses_leaves_no_guest_verified_and_is_reported(
    tmp_path: Path,
) -> None:
    rig = Rig(tmp_path)
    rig.say(_MAC)
    rig.kernel.refuse = "no such family"
    await rig.round()
    assert not rig.filters.is_up(_N1)
    assert rig.filters.plan.verified == ()
    (problem,) = rig.filters.problems
    assert (problem.field, problem.reason, problem.hint) == (
        "networks.n1",
        "no such family",
        "do something",
    )
    assert not await rig.filters.bind_answers(_KEY, 4711, _MAC)
    assert await rig.filters.sender(_KEY, 4711) is None
    rig.kernel.refuse = ""
    await rig.round()
    assert rig.filters.problems == ()
    assert rig.filters.is_up(_N1)


async def test_a_filter_that_was_removed_is_created_again_with_its_pairs(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.say(_MAC)
    await rig.filters.grant(_one(_MAC))
    await rig.round()
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


async def test_a_device_created_again_has_a_filter_of_its_own(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.say(_MAC)
    await rig.filters.grant(_one(_MAC))
    await rig.round()
    await rig.round(inode=8)
    assert rig.kernel.log == ["open n1", "fill n1", "open n1", "fill n1"]
    assert rig.kernel.tables == {_N1: {_KEY[1]: _MAC}}
    assert rig.filters.network_at(NamespaceRef("ns", 8), 2) == _N1
    assert rig.filters.network_at(NamespaceRef("ns", 7), 2) is None


async def test_where_macs_are_not_checked_yet_haproxy_does_not_know_an_address_with_a_mac(
    tmp_path: Path,
) -> None:
    rig = Rig(tmp_path)
    rig.say(None)
    await rig.round()
    assert rig.filters.is_plain(_N1)
    other = key("n1", "10.0.0.6")
    assert rig.filters.withheld({_KEY: ANY_MAC, other: _MAC}) == {other}
    rig.say(None, _MAC)
    await rig.round()
    assert not rig.filters.is_plain(_N1)
    assert rig.filters.withheld({_KEY: ANY_MAC, other: _MAC}) == frozenset()
    assert rig.changed == [frozenset({_N1})]


async def test_a_journal_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "gates.json").write_text("[")
    rig = Rig(tmp_path)
    rig.say(_MAC)
    with pytest.raises(HostRefused, match=r"gates\.json"):
        await rig.round()
