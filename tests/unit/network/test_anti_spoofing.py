"""Where the kernel is to look at MACs and limit hops, and that no record counts on a table that is not there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Self

import pytest

from imdsproxy.errors import HostRefused, Problem
from imdsproxy.host.names import Naming
from imdsproxy.host.state import (
    ListeningSocket,
    NamespaceRef,
    ObservedDevice,
    ObservedHost,
    ObservedNamespace,
)
from imdsproxy.model.entities import (
    METADATA_IPV4,
    METADATA_IPV6,
    InstanceId,
    InterfaceListener,
    MacAddress,
    NamespaceListener,
    Network,
    NetworkId,
    Scope,
)
from imdsproxy.model.identity import Learned
from imdsproxy.model.inventory import Inventory
from imdsproxy.model.observation import AddressKey
from imdsproxy.model.wire import VERIFIED_PORT, hop_limit_of, withhold_token
from imdsproxy.network.anti_spoofing.hop_limits import HopLimits
from imdsproxy.network.anti_spoofing.kernel import HopPlace, table_journal
from imdsproxy.network.anti_spoofing.mac_filters import MacFilters
from imdsproxy.network.anti_spoofing.plan import (
    ANY_MAC,
    LEARNED_PER_MAC,
    MacFilter,
    MacFilterPlan,
    excess_learned,
    plan_mac_filters,
    plan_pair,
    plan_pairs,
)
from imdsproxy.network.planned import Endpoint
from support.fake_mac_filters import FakeHopLimits, FakeMacFilters
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
            table_journal(directory / "mac-filters.json"),
            self.clock,
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
        sockets: tuple[ListeningSocket, ...] = (),
    ) -> None:
        """The listener loop's: with one device of the network, if it listens there."""
        place = NamespaceRef("ns", inode)
        endpoints = [Endpoint(_N1, METADATA_IPV4, 80, "eth0", place, 2)] * listening
        plan = await self.filters.open(
            self.inventory.networks,
            endpoints,
            ObservedHost(namespaces={"ns": ObservedNamespace(place, sockets=sockets)}),
            running=running,
        )
        if changed := await self.filters.settle(plan, sweep=sweep):
            self.changed.append(changed)

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
    assert (rig.directory / "mac-filters.json").read_text() == "{}"


async def test_a_filter_that_goes_is_released_first_and_removed_when_its_connections_have_ended(
    rig: Rig,
) -> None:
    await rig.round()
    rig.kernel.connected = {"ns"}
    gone = MacFilterPlan()
    await rig.filters.release(gone, sweep=True)
    await rig.filters.release(gone, sweep=True)
    assert rig.kernel.log == ["open n1", "fill n1", f"release {Naming().link(_N1)}"]
    await rig.filters.settle(gone, sweep=True)
    assert _N1 in rig.kernel.tables
    # Requests of before on connections that it does not redirect.
    assert rig.filters.is_up(_N1)
    rig.kernel.connected.clear()
    await rig.filters.expire()
    assert rig.kernel.tables == {}


@pytest.mark.parametrize("later", [False, True])
async def test_a_released_filter_is_created_anew_also_by_a_later_process(
    rig: Rig, *, later: bool
) -> None:
    await rig.round()
    rig.kernel.connected = {"ns"}
    await rig.filters.release(MacFilterPlan(), sweep=True)
    await rig.filters.settle(MacFilterPlan(), sweep=True)
    await (rig.later(_MAC) if later else rig).round()
    assert rig.kernel.log.count("open n1") == 2


async def test_connections_to_another_process_that_listens_there_go_on(rig: Rig) -> None:
    sockets = (ListeningSocket(METADATA_IPV4, 80, None, 1),)
    await rig.round(running=False, sockets=sockets)
    assert rig.kernel.busy == [frozenset({_N1})]


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


async def test_another_mac_of_the_same_instance_takes_the_old_ones_place_at_once(rig: Rig) -> None:
    await rig.up()
    await rig.filters.withdraw(_one(None))
    await rig.filters.withdraw(_one(_OTHER), staying={_KEY})
    rig.clock.time += 31
    await rig.filters.expire()
    assert rig.kernel.tables == {_N1: {_KEY[1]: _OTHER}}
    assert rig.filters.granted(_KEY) == _OTHER
    await rig.filters.withdraw(_one(_MAC))
    assert rig.kernel.tables == {_N1: {}}


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
    (rig.directory / "mac-filters.json").write_text("[")
    with pytest.raises(HostRefused, match=r"mac-filters\.json"):
        await rig.round()


# Hop limits

_RED, _GREY = NetworkId("red"), NetworkId("grey")
_NS, _NS_AGAIN = NamespaceRef("ns-red", 1), NamespaceRef("ns-red", 2)
_LIMITED = "+1tooo--:0:0:2|i-1|r-1"
_WITHHELD = "+1tooo--:0:0:0|i-1|r-1"


class _Case:
    def __init__(self, directory: Path, kernel: FakeHopLimits | None = None) -> None:
        self.kernel = kernel or FakeHopLimits()
        self.changed: list[frozenset[NetworkId]] = []
        self.needed: list[frozenset[NetworkId]] = []
        journal = table_journal(directory / "hops.json")
        self.hops = HopLimits(self.kernel, journal, self.needed.append)

    def records(self, *, complete: bool = True, **values: str | None) -> dict[str, str | None]:
        """A round of the record loop; what would be in force."""
        wanted: dict[str, str | None] = {f"{name}/10.0.0.5": one for name, one in values.items()}
        armed = self.hops.restrict(wanted)
        self.hops.commit(armed, complete=complete)
        return wanted

    async def limit(self) -> _Case:
        """With a record in red whose limit is in force."""
        self.records(red=_LIMITED)
        await self.open()
        self.records(red=_LIMITED)
        return self

    async def open(self, place: HopPlace = _NS) -> frozenset[NetworkId]:
        """The listener loop makes HAProxy listen in red, and in grey on the host."""
        at = ip_address("169.254.169.254")
        endpoints = [Endpoint(_RED, at, 80, None, place), Endpoint(_GREY, at, 80, None, None)]
        unsafe, changed = await self.hops.open(endpoints)
        self.changed += [changed] if changed else []
        return unsafe


@pytest.fixture
def case(tmp_path: Path) -> _Case:
    return _Case(tmp_path)


def test_a_map_value_has_its_limit() -> None:
    assert hop_limit_of(_LIMITED) == 2
    assert [hop_limit_of(one) for one in (None, "-", "!", "i-1|r-1", "@main|x|i|p")] == [64] * 5
    assert withhold_token(_LIMITED) == _WITHHELD
    assert withhold_token("+1tooo--:3:9:2") == "+1tooo--:3:9:0"
    assert withhold_token("+1tooo--:3:9:2:more|i|r") == "+1tooo--:3:9:0:more|i|r"


async def test_a_record_waits_for_the_rule_and_then_has_its_limit(case: _Case) -> None:
    assert case.records(red=_LIMITED) == {"red/10.0.0.5": _WITHHELD}
    assert case.needed == [frozenset({_RED})]
    assert case.hops.effective(_RED, "+1tooo--:0:0:2") == "+1tooo--:0:0:0"
    assert await case.open() == frozenset()
    assert case.kernel.there == {_NS}
    assert case.changed == [frozenset({_RED})]
    assert case.records(red=_LIMITED) == {"red/10.0.0.5": _LIMITED}
    assert case.hops.effective(_RED, "+1tooo--:0:0:2") == "+1tooo--:0:0:2"


async def test_without_limits_there_is_no_rule(case: _Case) -> None:
    case.records(red="+1trro--:0:0:64|i|r", grey="i|r")
    await case.open()
    assert not case.kernel.there
    assert not case.hops.journal.path.exists()


async def test_the_rule_is_removed_when_no_record_in_force_relies_on_it(case: _Case) -> None:
    await case.limit()
    wanted: dict[str, str | None] = {"red/10.0.0.5": None}
    armed = case.hops.restrict(wanted)
    await case.hops.sweep()
    assert case.kernel.there == {_NS}
    case.hops.commit(armed, complete=True)
    assert case.needed[-1] == frozenset({_RED})
    await case.open()
    await case.hops.sweep()
    assert not case.kernel.there
    assert json.loads(case.hops.journal.path.read_text()) == {}


async def test_where_the_kernel_refuses_no_token_is_given_and_a_reason_is(case: _Case) -> None:
    case.kernel.refuses.add(_NS)
    case.records(red=_LIMITED)
    assert await case.open() == frozenset()
    assert [one.field for one in case.hops.refused.values()] == ["networks.red"]
    assert case.records(red=_LIMITED) == {"red/10.0.0.5": _WITHHELD}
    case.kernel.refuses.clear()
    await case.open()
    assert not case.hops.refused
    assert case.records(red=_LIMITED) == {"red/10.0.0.5": _LIMITED}


async def test_a_network_is_not_listened_in_while_its_records_rely_on_a_refused_rule(
    case: _Case,
) -> None:
    """A namespace made anew, before HAProxy's map says that its guests get no tokens."""
    await case.limit()
    case.kernel.refuses.add(_NS_AGAIN)
    assert await case.open(_NS_AGAIN) == {_RED}
    assert case.changed[-1] == frozenset({_RED})
    assert case.records(red=_LIMITED) == {"red/10.0.0.5": _WITHHELD}
    assert case.needed[-1] == frozenset({_RED})
    assert await case.open(_NS_AGAIN) == frozenset()


async def test_what_an_earlier_process_left_is_relied_on_where_it_can_be_had(
    tmp_path: Path,
) -> None:
    kernel = FakeHopLimits()
    first = _Case(tmp_path, kernel)
    first.records(red=_LIMITED, grey=_LIMITED)
    await first.open()
    kernel.there.clear()
    kernel.refuses.add(None)
    second = _Case(tmp_path, kernel)
    await second.hops.preload()
    assert second.records(complete=False, red=_LIMITED, grey=_LIMITED) == {
        "red/10.0.0.5": _LIMITED,
        "grey/10.0.0.5": _WITHHELD,
    }


async def test_an_earlier_process_s_rule_stays_until_all_records_were_looked_at(
    tmp_path: Path,
) -> None:
    first = await _Case(tmp_path).limit()
    second = _Case(tmp_path, first.kernel)
    await second.hops.preload()
    second.records(complete=False, grey="i|r")
    for there in ({_NS}, set()):
        await second.open()
        await second.hops.sweep()
        assert first.kernel.there == there
        second.records(complete=True)


async def test_a_rule_that_another_program_removed_is_created_again_or_relied_on_no_more(
    case: _Case,
) -> None:
    await case.limit()
    case.kernel.there.clear()
    case.needed.clear()
    await case.hops.lost("another")
    assert not case.needed
    # Before the next round, which may have to wait: answers have no limit meanwhile.
    await case.hops.lost("td-hops")
    assert case.kernel.there == {_NS}
    assert case.needed == [frozenset({_RED})]
    case.kernel.there.clear()
    case.kernel.refuses.add(_NS)
    await case.hops.lost("")
    assert await case.open() == {_RED}
    assert case.records(red=_LIMITED) == {"red/10.0.0.5": _WITHHELD}


async def test_a_rule_that_is_removed_while_it_is_created_is_created_again(case: _Case) -> None:
    noticed: list[asyncio.Task[None]] = []

    def flush() -> None:
        case.kernel.watch = lambda: None
        case.kernel.there.clear()
        noticed.append(asyncio.create_task(case.hops.lost("")))

    await case.limit()
    await case.hops.lost("")
    case.kernel.watch = flush
    await case.open()
    await asyncio.gather(*noticed)
    assert case.kernel.there == {_NS}


async def test_a_rule_that_is_being_removed_is_relied_on_no_more(case: _Case) -> None:
    await case.limit()
    case.records(red=None)
    came: list[dict[str, str | None]] = []
    case.kernel.watch = lambda: came.append(case.records(red=_LIMITED))
    await case.hops.sweep()
    assert came == [{"red/10.0.0.5": _WITHHELD}]
    await case.open()
    assert case.kernel.there == {_NS}


async def test_every_rule_is_removed_at_the_end(case: _Case, tmp_path: Path) -> None:
    await case.limit()
    await _Case(tmp_path, case.kernel).hops.close_all()
    assert not case.kernel.there


# Plans

_PLACE = NamespaceRef("red", 42)
_DEVICE_MAC = "02:00:00:00:00:01"
_IPV4 = Endpoint(_RED, METADATA_IPV4, 80, None, _PLACE)
_IPV6 = Endpoint(_RED, METADATA_IPV6, 80, "br0", _PLACE, 2)
_NAMING = Naming()


_DEVICES = {
    name: ObservedDevice(name, index, up, 1500, mac=mac, master=master, kind=kind)
    for name, index, up, mac, master, kind in (
        ("lo", 1, True, "", 0, ""),
        ("br0", 2, True, _DEVICE_MAC, 0, "bridge"),
        ("v1", 3, True, _DEVICE_MAC, 2, "veth"),
        ("eth9", 4, True, _DEVICE_MAC, 0, ""),
        ("tun0", 5, True, "", 0, ""),
        ("off", 6, False, _DEVICE_MAC, 0, ""),
    )
}
_HOST = ObservedHost(namespaces={"red": ObservedNamespace(_PLACE, _DEVICES)})


def _plan(*endpoints: Endpoint, network: Network | None = None, macs: bool = True) -> MacFilterPlan:
    given = network or Network(_RED, NamespaceListener("red"))
    networks: Mapping[NetworkId, Network] = {given.id: given}
    return plan_mac_filters(networks, endpoints, _HOST, _NAMING, lambda _: macs)


@pytest.mark.parametrize(
    ("network", "macs"),
    [
        (Network(_RED, NamespaceListener("red")), False),
        (Network(_RED, NamespaceListener("red"), mac_check=False), True),
        (Network(_RED, NamespaceListener("red"), scope=Scope.ROUTER), True),
        # One that is only kept is checked as it was.
        (Network(_GREY, NamespaceListener("grey")), True),
    ],
)
def test_a_network_without_macs_or_checks_has_no_filter(network: Network, *, macs: bool) -> None:
    plan = _plan(_IPV4, _IPV6, network=network, macs=macs)
    assert plan == MacFilterPlan(plain=(_IPV4, _IPV6))
    assert plan.plain_networks == {_RED}


def test_a_filter_is_on_every_device_whose_packets_bring_a_mac_to_the_host() -> None:
    plan = _plan(_IPV4, _IPV6)
    assert plan.unverified == (_IPV4, _IPV6)
    # Of a bridge's port the bridge takes the packets.
    devices = (("br0", 2), ("eth9", 4))
    assert plan.filters == {_RED: MacFilter(_RED, _PLACE, devices, _NAMING.link(_RED))}
    assert [(one.address, one.device, one.device_index) for one in plan.verified] == [
        (METADATA_IPV4, "br0", 2),
        (METADATA_IPV4, "eth9", 4),
        (METADATA_IPV6, "br0", 2),
    ]
    assert {one.port for one in plan.verified} == {VERIFIED_PORT}
    assert plan.binds == (*plan.verified, *plan.unverified)
    assert plan.without({_RED}) == MacFilterPlan(unverified=(_IPV4, _IPV6))


def test_an_interface_of_the_host_has_its_filter_there() -> None:
    network = Network(_GREY, InterfaceListener("virbr0"))
    endpoint = Endpoint(_GREY, METADATA_IPV4, 80, "virbr0", None, 9)
    plan = _plan(endpoint, network=network)
    assert plan.filters[_GREY].namespace is None
    assert plan.filters[_GREY].devices == (("virbr0", 9),)


LINK_LOCAL = "fe80::5054:ff:fe00:1"


def _inventory(*instances: object, mac_check: bool = True) -> Inventory:
    made = Inventory()
    made.observe(full("file", [network("n1", mac_check=mac_check)], instances))  # type: ignore[arg-type]  # for brevity
    return made


@pytest.mark.parametrize(
    ("address", "mac"),
    [
        *((one, _MAC) for one in ("10.0.0.5", "2001:db8::5", LINK_LOCAL)),
        ("10.0.0.6", ANY_MAC),
        # Contested, and nobody's.
        ("10.0.0.7", None),
        ("10.0.0.99", None),
    ],
)
def test_an_address_goes_with_the_mac_of_its_only_owner(
    address: str, mac: MacAddress | None
) -> None:
    records = [
        instance("a", "10.0.0.5", "2001:db8::5", mac=_MAC),
        instance("b", "10.0.0.6"),
        instance("c", "10.0.0.7", mac=MacAddress("52:54:00:00:00:03")),
        instance("d", "10.0.0.7", mac=_OTHER),
    ]
    asked = key("n1", address)
    assert plan_pairs(_inventory(*records), [asked], {}) == {asked: mac}
    assert plan_pair(_inventory(*records, mac_check=False), asked, {}) is None


def test_what_was_learned_goes_with_the_mac_it_was_learned_by_while_that_holds() -> None:
    asked = key("n1", "10.0.0.77")
    learned = {asked: Learned(InstanceId("a"), 0.0, mac=_MAC)}
    assert plan_pair(_inventory(instance("a", mac=_MAC)), asked, learned) == _MAC
    assert plan_pair(_inventory(instance("a", "10.0.0.5", mac=_MAC)), asked, learned) is None
    # What a record says comes first.
    claimed = _inventory(instance("a", mac=_MAC), instance("b", "10.0.0.77", mac=_OTHER))
    assert plan_pair(claimed, asked, learned) == _OTHER


def test_the_oldest_learned_addresses_of_a_mac_make_room() -> None:
    def entry(mac: MacAddress) -> Learned:
        return Learned(InstanceId("a"), 0.0, mac=mac)

    mine: list[AddressKey] = [key("n1", f"10.0.0.{number}") for number in range(LEARNED_PER_MAC)]
    learned = {key("n1", "10.9.9.9"): entry(_OTHER), **{each: entry(_MAC) for each in mine}}
    assert excess_learned(learned, mine[0], _MAC) == ()
    assert excess_learned(learned, key("n1", "10.0.1.1"), _MAC) == (mine[0],)
    assert excess_learned(learned, key("n2", "10.0.1.1"), _MAC) == ()
