"""Gates as networks come and go, whatever the kernel says."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from imdsproxy.app.gates import Gates
from imdsproxy.core.endpoints import Endpoint
from imdsproxy.core.hostnames import Naming
from imdsproxy.core.hoststate import NamespaceRef, ObservedHost
from imdsproxy.core.inventory import Inventory
from imdsproxy.core.model import METADATA_IPV4, MacAddress, NetworkId
from imdsproxy.core.observation import AddressKey
from imdsproxy.core.pairs import ANY_MAC
from imdsproxy.errors import HostRefused
from support.fake_gates import FakeGates
from support.record_builders import full, instance, key, network

_N1 = NetworkId("n1")
_MAC, _OTHER = MacAddress("52:54:00:00:00:01"), MacAddress("52:54:00:00:00:02")
_KEY = key("n1", "10.0.0.5")


class _Clock:
    time = 100.0

    def monotonic(self) -> float:
        return self.time


class Rig:
    def __init__(self, directory: Path, kernel: FakeGates | None = None) -> None:
        self.kernel = kernel or FakeGates()
        self.inventory = Inventory(["file"])
        self.changed: list[frozenset[NetworkId]] = []
        self.missing: list[NetworkId] = []
        self.clock = _Clock()
        self.gates = Gates(
            self.kernel,
            self.inventory,
            Naming(),
            directory / "gates.json",
            lambda path, data: (path.write_bytes(data), None)[1],
            self.clock,  # type: ignore[arg-type]  # only the monotonic one is used
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
        plan = await self.gates.open(
            self.inventory.networks,
            endpoints if listening else [],
            ObservedHost(),
            running=running,
        )
        await self.gates.settle(plan, sweep=sweep)


def _one(mac: MacAddress | None, at: AddressKey = _KEY) -> dict[AddressKey, MacAddress | None]:
    return {at: mac}


async def test_a_gate_is_opened_before_and_filled_after(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.say(_MAC)
    rig.gates.prime(_one(_MAC), complete=True)
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


async def test_an_address_that_another_has_now_is_withdrawn_before_it_is_granted(
    tmp_path: Path,
) -> None:
    rig = Rig(tmp_path)
    rig.say(_MAC)
    await rig.gates.grant(_one(_MAC))
    await rig.round()
    await rig.gates.withdraw(_one(_OTHER))
    assert rig.kernel.tables == {_N1: {}}
    await rig.gates.grant(_one(_OTHER))
    assert rig.kernel.tables == {_N1: {_KEY[1]: _OTHER}}


async def test_an_address_of_nobody_s_goes_after_a_while(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.say(_MAC)
    await rig.gates.grant(_one(_MAC))
    await rig.round()
    await rig.gates.withdraw(_one(None))
    rig.clock.time += 29
    await rig.gates.expire()
    assert rig.gates.granted(_KEY) == _MAC
    # It comes back: nothing was to go.
    await rig.gates.withdraw(_one(_MAC))
    rig.clock.time += 100
    await rig.gates.expire()
    assert rig.gates.granted(_KEY) == _MAC
    await rig.gates.withdraw(_one(None))
    rig.clock.time += 31
    await rig.gates.expire()
    assert rig.kernel.tables == {_N1: {}}
    assert list(rig.gates.keys()) == []


async def test_a_later_process_takes_over_what_is_there(tmp_path: Path) -> None:
    first = Rig(tmp_path)
    first.say(_MAC)
    await first.gates.grant(_one(_MAC))
    await first.round()
    second = Rig(tmp_path, first.kernel)
    second.say(_MAC)
    first.kernel.log.clear()
    await second.round()
    assert first.kernel.log == []
    assert second.gates.granted(_KEY) == _MAC
    assert second.gates.is_up(_N1)


async def test_one_that_has_to_start_haproxy_lets_through_what_it_knows(tmp_path: Path) -> None:
    first = Rig(tmp_path)
    first.say(_MAC)
    kept = key("n1", "10.0.0.9")
    await first.gates.grant({_KEY: _MAC, kept: _OTHER})
    await first.round()
    second = Rig(tmp_path, first.kernel)
    second.say(_OTHER)
    second.gates.prime(_one(_OTHER), complete=True)
    await second.round()
    assert first.kernel.tables == {_N1: {_KEY[1]: _OTHER}}
    # Where not all have told what they know, what was let through before goes on.
    third = Rig(tmp_path, first.kernel)
    first.kernel.tables[_N1][kept[1]] = _OTHER
    third.say(_MAC, in_sync=False)
    third.gates.prime(_one(_MAC), complete=False)
    await third.round(sweep=False)
    assert first.kernel.tables == {_N1: {_KEY[1]: _MAC, kept[1]: _OTHER}}


async def test_a_source_that_has_not_told_yet_closes_no_gate(tmp_path: Path) -> None:
    first = Rig(tmp_path)
    first.say(_MAC)
    await first.gates.grant(_one(_MAC))
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
async def test_a_gate_that_nobody_needs_is_closed(tmp_path: Path, how: str) -> None:
    rig = Rig(tmp_path)
    rig.say(_MAC)
    await rig.round()
    if how == "no-check":
        rig.say(_MAC, check=False)
    await rig.round(listening=how == "no-check")
    assert rig.kernel.tables == {}
    assert (tmp_path / "gates.json").read_text() == "{}"


async def test_what_an_earlier_process_left_is_closed(tmp_path: Path) -> None:
    first = Rig(tmp_path)
    first.say(_MAC)
    await first.round()
    second = Rig(tmp_path, first.kernel)
    await second.round(listening=False, sweep=False)
    assert first.kernel.tables
    await second.round(listening=False)
    assert first.kernel.tables == {}


async def test_a_kernel_that_refuses_leaves_nobody_verified_and_is_told_of(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.say(_MAC)
    rig.kernel.refuse = "no such family"
    await rig.round()
    assert not rig.gates.is_up(_N1)
    assert rig.gates.plan.verified == ()
    (problem,) = rig.gates.problems
    assert (problem.field, problem.reason, problem.hint) == (
        "networks.n1",
        "no such family",
        "do something",
    )
    assert not await rig.gates.tell(_KEY, 4711, _MAC)
    assert await rig.gates.sender(_KEY, 4711) is None
    rig.kernel.refuse = ""
    await rig.round()
    assert rig.gates.problems == ()
    assert rig.gates.is_up(_N1)


async def test_a_gate_that_somebody_took_away_is_made_again_with_its_pairs(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.say(_MAC)
    await rig.gates.grant(_one(_MAC))
    await rig.round()
    rig.kernel.lose(_N1)
    rig.gates.lost(Naming().link(_N1))
    assert rig.missing == [_N1]
    await rig.round()
    assert rig.kernel.tables == {_N1: {_KEY[1]: _MAC}}
    # Our own closing and opening is told of as well.
    rig.kernel.log.clear()
    rig.gates.lost(Naming().link(_N1))
    await rig.round()
    assert rig.kernel.log == []
    # Without an event it is noticed at the next change.
    rig.kernel.lose(_N1)
    await rig.gates.withdraw(_one(_OTHER))
    assert not rig.gates.is_up(_N1)
    await rig.gates.grant(_one(_OTHER))
    await rig.round()
    assert rig.kernel.tables == {_N1: {_KEY[1]: _OTHER}}


async def test_a_device_made_anew_has_a_gate_of_its_own(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.say(_MAC)
    await rig.gates.grant(_one(_MAC))
    await rig.round()
    await rig.round(inode=8)
    assert rig.kernel.log == ["open n1", "fill n1", "open n1", "fill n1"]
    assert rig.kernel.tables == {_N1: {_KEY[1]: _MAC}}
    assert rig.gates.network_at(NamespaceRef("ns", 8), 2) == _N1
    assert rig.gates.network_at(NamespaceRef("ns", 7), 2) is None


async def test_where_nobody_looks_yet_haproxy_does_not_know_an_address_with_a_mac(
    tmp_path: Path,
) -> None:
    rig = Rig(tmp_path)
    rig.say(None)
    await rig.round()
    assert rig.gates.is_plain(_N1)
    other = key("n1", "10.0.0.6")
    assert rig.gates.withheld({_KEY: ANY_MAC, other: _MAC}) == {other}
    rig.say(None, _MAC)
    await rig.round()
    assert not rig.gates.is_plain(_N1)
    assert rig.gates.withheld({_KEY: ANY_MAC, other: _MAC}) == frozenset()
    assert rig.changed == [frozenset({_N1})]


async def test_a_journal_that_cannot_be_read_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "gates.json").write_text("[")
    rig = Rig(tmp_path)
    rig.say(_MAC)
    with pytest.raises(HostRefused, match=r"gates\.json"):
        await rig.round()
