"""Who an unknown address is, by records, the neighbour table and a source that can be asked; how it is explained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address
from types import SimpleNamespace
from typing import Any, Final

import pytest

from imdsproxy.api.guests import Explanation, explain
from imdsproxy.controller.lookup import Lookup
from imdsproxy.controller.record_loop import RecordLoop
from imdsproxy.errors import HostRefused, Problem
from imdsproxy.model.entities import (
    Instance,
    InstanceId,
    IpAddress,
    MacAddress,
    NamespaceListener,
    Network,
    NetworkId,
    Port,
    Scope,
    Upstream,
)
from imdsproxy.model.identity import Denial, Learned
from imdsproxy.model.inventory import Inventory
from imdsproxy.model.observation import AddressKey, Observation
from imdsproxy.model.policy import OperatorOverride, PolicyBook, PolicyRules
from imdsproxy.model.policy_report import DEFAULT_ORIGIN
from imdsproxy.network.anti_spoofing.claims import ForgedClaims
from imdsproxy.network.anti_spoofing.kernel import Claims
from imdsproxy.network.anti_spoofing.mac_filters import MacFilters
from imdsproxy.network.anti_spoofing.plan import LEARNED_PER_MAC, plan_pair
from imdsproxy.nova.routing import EndpointSet, NovaRouting
from imdsproxy.reconcile.reconciler import Tickets
from imdsproxy.sources import api
from support.fake_mac_filters import no_hop_limits
from support.hand_clock import HandClock

_NET: Final = NetworkId("net")
_ROUTER: Final = NetworkId("router")
_ADDRESS: Final = IPv4Address("10.0.0.5")
_EUI64: Final = IPv6Address("fe80::f816:3eff:fe00:5")
_ASKED: Final[AddressKey] = (_NET, _ADDRESS)
_PRIVATE: Final[AddressKey] = (_NET, IPv6Address("fe80::1234"))
_BEHIND: Final[AddressKey] = (_ROUTER, _ADDRESS)
_MAC: Final = MacAddress("fa:16:3e:00:00:05")
_OTHER: Final = MacAddress("fa:16:3e:00:00:99")
_FOUND: Final = api.PortFound(_NET, InstanceId("web"))


def _instance(name: str = "web", mac: MacAddress | None = _MAC, *addresses: IpAddress) -> Instance:
    ports = (Port(_NET, mac, addresses),)
    nova = Upstream.NOVA
    return Instance(InstanceId(name), name, name, project="blue", ports=ports, upstream=nova)


_WEB: Final = _instance("web", _MAC, _ADDRESS)
_BARE: Final = _instance()
_NO_MAC: Final = _instance("web", None, _ADDRESS)


class _Filters(MacFilters):
    """MAC filters that follow the records at once."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.up, self.plain, self.withdrawn = True, False, False
        self.bound: list[tuple[AddressKey, int, MacAddress]] = []
        self.senders: dict[int, MacAddress] = {}
        self.on_bind: Callable[[], None] = lambda: None

    def is_plain(self, network: NetworkId) -> bool:
        del network
        return self.plain

    def is_up(self, network: NetworkId) -> bool:
        del network
        return self.up

    def granted(self, key: AddressKey) -> MacAddress | None:
        if self.withdrawn:
            return None
        return plan_pair(self.rig.inventory, key, self.rig.records.learned)

    def keys(self) -> Iterator[AddressKey]:
        return iter(())

    async def sender(self, key: AddressKey, port: int) -> MacAddress | None:
        del key
        return self.senders.get(port)

    async def read_claims(self, before: Mapping[NetworkId, Claims]) -> Mapping[NetworkId, Claims]:
        return before

    async def bind_answers(self, key: AddressKey, port: int, mac: MacAddress) -> bool:
        self.bound.append((key, port, mac))
        self.on_bind()
        return True


class _AtOnce(Tickets):
    """Everything is in force at once."""

    async def wait(self, number: int) -> None:
        del number


class Rig:
    """A look-up over records, a neighbour table and a source that can be asked.

    Attributes:
        mac: What the neighbour table has for every address.
        asked: How often it was asked for.
        broken: It cannot be read.
    """

    def __init__(
        self,
        *instances: Instance,
        listed: Scope | None = None,
        mac_check: bool = True,
        in_sync: bool = True,
    ) -> None:
        self.mac: MacAddress | None = None
        self.asked, self.broken = 0, False
        self.inventory = Inventory(["neutron", "file"])
        self.source = _LookUps(self)
        self.filters, self.clock = _Filters(self), HandClock()
        none: Any = SimpleNamespace(
            region=lambda: None, revisions={}
        )  # nothing is compiled or applied
        self.records = RecordLoop(
            self.inventory,
            none,
            none,
            self.clock,
            id,
            lambda _: None,
            self.filters,
            no_hop_limits(),
            none,
            none,
            routing=lambda: NovaRouting((EndpointSet("default", b"secret"),)),
            tickets=_AtOnce(),
        )
        self.lookup = Lookup(
            self.inventory,
            self.records,
            self._neighbour,
            self.clock,
            lambda: 30.0,
            self.filters,
            self.source,  # type: ignore[arg-type]  # the part that is used
        )
        networks = {}
        if listed is not None:
            name = _NET if listed is Scope.NETWORK else _ROUTER
            listener = NamespaceListener("ns")
            networks = {name: Network(name, listener, scope=listed, mac_check=mac_check)}
        self.inventory.observe(Observation("file", full=True, networks=networks))
        self.publish(*instances, in_sync=in_sync)
        self.unix = SimpleNamespace(serving=True, problem=None)

    async def _neighbour(self, network: Network, address: IpAddress) -> MacAddress | None:
        del network, address
        self.asked += 1
        if self.broken:
            raise HostRefused("no such namespace")
        return self.mac

    def answer(
        self, answer: api.LookUp, address: IpAddress = _ADDRESS, scope: Scope = Scope.NETWORK
    ) -> None:
        network = _NET if scope is Scope.NETWORK else _ROUTER
        self.source.answers[scope, network, address] = answer

    def publish(self, *instances: Instance, source: str = "neutron", in_sync: bool = True) -> None:
        known = {each.id: each for each in instances}
        implied = frozenset({_NET})
        self.inventory.observe(
            Observation(
                source, full=True, instances=known, implied_networks=implied, in_sync=in_sync
            )
        )

    async def look(
        self, key: AddressKey = _ASKED, scope: Scope | None = None, port: int | None = None
    ) -> str:
        """By which instance's record, or why by none."""
        outcome = await self.lookup.look(key, scope, port)
        return outcome if isinstance(outcome, Denial) else outcome.instance

    async def explain(self, key: AddressKey = _ASKED) -> Explanation:
        controller: Any = SimpleNamespace(
            lookup=self.lookup,
            listeners=SimpleNamespace(
                last_plan=SimpleNamespace(endpoints=()), degraded=tuple, unix=self.unix
            ),
            haproxy=SimpleNamespace(worker=None, layout=None),
            policy_store=SimpleNamespace(is_of_fleet=lambda _: False),
            forged_claims=ForgedClaims(self.filters, self.clock),
        )
        return await explain(controller, key)


class _LookUps:
    """A source that is asked for addresses, and publishes what it finds before it gives it, unless it is `silent`."""

    name = "neutron"

    def __init__(self, rig: Rig) -> None:
        self._rig, self.silent = rig, False
        self.answers: dict[tuple[Scope, NetworkId, IpAddress], api.LookUp] = {}
        self.asked: list[tuple[Scope, NetworkId, IpAddress]] = []
        self.routed: dict[AddressKey, api.PortFound] = {}
        self.freshness: str | None = None

    async def look_up(self, scope: Scope, network: NetworkId, address: IpAddress) -> api.LookUp:
        self.asked.append((scope, network, address))
        answer = self.answers.get((scope, network, address), api.PortMissing())
        if isinstance(answer, api.PortFound) and scope is Scope.ROUTER:
            self.routed[network, address] = answer
        if isinstance(answer, api.PortFound) and not self.silent:
            self._rig.publish(_WEB)
        return answer

    def routes(self) -> Mapping[AddressKey, api.PortFound]:
        return dict(self.routed)

    def explain_freshness(self, network: NetworkId, address: IpAddress) -> str | None:
        del network, address
        return self.freshness


_LEARNED: Final = Learned(InstanceId("web"), 130.0, mac=_MAC)


@pytest.mark.parametrize(
    ("instances", "mac", "key", "expected"),
    [
        # By the record, without a look at the neighbour table.
        ((_WEB,), _OTHER, _ASKED, "web"),
        ((_WEB,), _MAC, (_NET, IPv4Address("10.0.0.99")), Denial.UNKNOWN),
        ((_WEB,), _MAC, (NetworkId("blue"), _ADDRESS), Denial.UNKNOWN),
        # A private link-local address is known by its MAC.
        ((_WEB,), _MAC, _PRIVATE, "web"),
        ((_WEB,), _OTHER, _PRIVATE, Denial.UNKNOWN),
        ((_WEB,), None, _PRIVATE, Denial.UNKNOWN),
        ((_WEB, _instance("db")), _MAC, _PRIVATE, Denial.CONFLICT),
        (None, None, _PRIVATE, Denial.UNAVAILABLE),
    ],
)
async def test_an_address_is_known_by_its_record_or_else_by_its_mac(
    instances: tuple[Instance, ...] | None, mac: MacAddress | None, key: AddressKey, expected: str
) -> None:
    rig = Rig(
        *(instances or ()), listed=Scope.NETWORK, mac_check=False, in_sync=instances is not None
    )
    rig.mac, rig.lookup.source = mac, None
    assert await rig.look(key) == expected
    assert rig.asked == (key == _PRIVATE)
    learned = (key, expected) == (_PRIVATE, "web")
    assert rig.records.learned == ({_PRIVATE: _LEARNED} if learned else {})
    rig.broken = True
    rig.records.learned.clear()
    if learned:
        assert await rig.look(key) == Denial.UNKNOWN


@pytest.mark.parametrize(
    ("instance", "mac", "sender", "expected"),
    [
        (_WEB, _MAC, None, "web"),
        (_WEB, _OTHER, None, Denial.MISMATCH),
        (_WEB, None, None, Denial.MISMATCH),
        # The MAC that the connection came from counts, and not the neighbour table's.
        (_WEB, _OTHER, _MAC, "web"),
        # By its MAC alone, at whatever address.
        (_BARE, _MAC, None, "web"),
        # Without a MAC in its record it is believed with any.
        (_NO_MAC, _OTHER, None, "web"),
    ],
)
async def test_an_unverified_address_is_known_with_its_mac_and_no_other_reads_the_answer(
    instance: Instance, mac: MacAddress | None, sender: MacAddress | None, expected: str
) -> None:
    rig = Rig(instance, listed=Scope.NETWORK)
    rig.mac = mac
    if sender is not None:
        rig.filters.senders[4711] = sender
    assert await rig.look(port=4711) == expected
    bound = expected == "web" and instance is not _NO_MAC
    assert rig.filters.bound == ([(_ASKED, 4711, _MAC)] if bound else [])
    assert rig.records.learned == ({_ASKED: _LEARNED} if instance is _BARE else {})


@pytest.mark.parametrize(
    ("mac", "gone", "expected"),
    [
        (_MAC, False, {_PRIVATE: replace(_LEARNED, until=161.0)}),
        (_OTHER, False, {}),
        (None, False, {}),
        (_MAC, True, {}),
    ],
)
async def test_what_was_learned_is_looked_at_again_when_its_time_is_over(
    mac: MacAddress | None, expected: dict[AddressKey, Learned], *, gone: bool
) -> None:
    rig = Rig(_WEB, listed=Scope.NETWORK, mac_check=False)
    rig.mac = _MAC
    await rig.look(_PRIVATE)
    asked, rig.mac = rig.asked, mac
    if gone:
        rig.publish()
    await rig.lookup.review()
    assert (rig.asked, rig.records.learned) == (asked, {_PRIVATE: _LEARNED})
    rig.clock.time = 131
    await rig.lookup.review()
    assert rig.records.learned == expected


async def test_a_learned_address_is_put_in_force_again_where_its_filter_is_gone() -> None:
    rig = Rig(_BARE, listed=Scope.NETWORK)
    rig.mac = _MAC
    assert await rig.look(port=1) == "web"
    rig.filters.withdrawn = True
    # The records of this test put nothing in force again.
    assert await rig.look(port=2) == Denial.UNAVAILABLE
    assert rig.records._work.addresses >= {_ASKED}


async def test_what_the_kernel_reports_needs_no_second_look_and_is_followed() -> None:
    rig = Rig(_BARE, _instance("db", _OTHER), listed=Scope.NETWORK)
    rig.lookup.is_followed = lambda _: True
    rig.mac = _MAC
    await rig.look(port=1)
    asked, rig.clock.time = rig.asked, 1e9
    await rig.lookup.review()
    assert (rig.asked, rig.records.learned[_ASKED].instance) == (asked, "web")
    # Whoever claims it ends nothing of the owner's: what counts is the MAC that requests come from.
    rig.mac = _OTHER
    rig.lookup.on_neighbour(_ASKED, _OTHER)
    await rig.lookup.review(everything=True)
    assert rig.records.learned == {_ASKED: Learned(InstanceId("web"), math.inf, mac=_MAC)}
    await rig.look(port=2)
    assert rig.records.learned == {_ASKED: Learned(InstanceId("db"), math.inf, mac=_OTHER)}
    rig.filters.up = False
    rig.mac = _MAC
    await rig.lookup.review(everything=True)
    assert rig.records.learned[_ASKED].instance == "web"
    # Of an address that was not learned a change is of no account.
    for mac in (None, _MAC):
        rig.lookup.on_neighbour(_ASKED, mac)
        assert rig.records.learned == {}


async def test_an_address_that_another_takes_meanwhile_never_gives_that_one_s_record() -> None:
    rig = Rig(_BARE, listed=Scope.NETWORK)
    rig.mac = _MAC
    thief = _instance("thief", _OTHER, _ADDRESS)
    rig.filters.on_bind = lambda: rig.publish(thief)
    assert await rig.look(port=4711) == Denial.MISMATCH
    # Nor is it answered while it has no record that is in force.
    rig.publish(_BARE)
    rig.filters.on_bind = lambda: setattr(rig.records, "routing", NovaRouting)
    assert await rig.look(port=4711) == Denial.UNAVAILABLE


async def test_without_a_mac_filter_none_with_a_mac_is_answered() -> None:
    rig = Rig(_WEB, listed=Scope.NETWORK)
    rig.mac = _OTHER
    # Verified, whatever the neighbour table has by now.
    assert await rig.look() == "web"
    rig.mac, rig.filters.up = _MAC, False
    assert await rig.look(port=4711) == Denial.UNAVAILABLE
    # Nor where HAProxy listens as if no network checked MACs.
    rig.filters.plain = True
    assert await rig.look() == Denial.UNAVAILABLE


async def test_one_mac_has_so_many_addresses_and_the_oldest_goes() -> None:
    rig = Rig(_BARE, listed=Scope.NETWORK)
    rig.mac = _MAC
    keys = [(_NET, IPv4Address(f"10.0.1.{number}")) for number in range(LEARNED_PER_MAC + 1)]
    for key in keys:
        assert await rig.look(key, port=1) == "web"
    assert list(rig.records.learned) == keys[1:]


def test_what_was_learned_before_a_restart_is_looked_for_among_addresses_without_an_owner() -> None:
    rig = Rig(_WEB, _instance("db", _OTHER), listed=Scope.NETWORK)
    asked: list[AddressKey] = []

    def granted(key: AddressKey) -> MacAddress:
        asked.append(key)
        return _OTHER

    keys = [_ASKED, (_NET, _EUI64), _PRIVATE]
    filters = SimpleNamespace(keys=lambda: iter(keys), granted=granted)
    rig.lookup.mac_filters = filters  # type: ignore[assignment]  # the part that is used
    rig.lookup.recall()
    assert asked == [_PRIVATE]
    assert rig.records.learned == {_PRIVATE: Learned(InstanceId("db"), 100.0, mac=_OTHER)}


# A source that can be asked


async def test_an_address_that_no_source_has_reported_is_asked_for_and_a_known_one_is_not() -> None:
    rig = Rig()
    rig.answer(_FOUND)
    assert await rig.look() == await rig.look() == "web"
    assert rig.source.asked == [(Scope.NETWORK, *_ASKED)]
    assert rig.records.learned == {}
    rig.records.routing = NovaRouting
    assert await rig.look() == Denial.UNAVAILABLE


@pytest.mark.parametrize("in_sync", [True, False])
@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (api.PortMissing(), Denial.UNKNOWN),
        (api.PortAmbiguous(2), Denial.UNKNOWN),
        (api.LookUpUnavailable("down"), Denial.UNAVAILABLE),
        # Found, and gone again: it is to be asked for once more.
        (_FOUND, Denial.UNAVAILABLE),
    ],
)
async def test_what_is_not_found_is_404_once_all_other_sources_have_reported(
    answer: api.LookUp, expected: Denial, *, in_sync: bool
) -> None:
    rig = Rig()
    rig.source.silent = True
    rig.answer(answer)
    rig.inventory.observe(Observation("file", in_sync=in_sync))
    assert await rig.look() == (expected if in_sync else Denial.UNAVAILABLE)


async def test_an_address_that_another_source_claims_too_is_contested() -> None:
    rig = Rig()
    rig.answer(_FOUND)
    rig.answer(_FOUND, scope=Scope.ROUTER)
    rig.publish(_instance("other", _OTHER, _ADDRESS), source="file")
    rig.publish(_WEB)
    assert await rig.look() == Denial.CONFLICT
    assert await rig.look(_BEHIND, Scope.ROUTER) == Denial.CONFLICT


@pytest.mark.parametrize("listed", [None, Scope.ROUTER])
async def test_behind_a_router_an_address_is_known_as_long_as_the_source_knows_the_route(
    listed: Scope | None,
) -> None:
    rig = Rig(listed=listed)
    rig.answer(_FOUND, scope=Scope.ROUTER)
    assert await rig.look(_BEHIND, Scope.ROUTER if listed is None else None) == "web"
    behind = {_BEHIND: Learned(InstanceId("web"), math.inf, via=_ASKED)}
    await rig.lookup.review(everything=True)
    assert rig.records.learned == behind
    # After a restart, too.
    rig.records.learned.clear()
    rig.lookup.follow_routes()
    assert rig.records.learned == behind
    rig.source.routed[_BEHIND] = api.PortFound(_NET, InstanceId("db"))
    rig.lookup.follow_routes()
    assert rig.records.learned[_BEHIND].instance == "db"
    rig.source.routed.clear()
    await rig.lookup.review()
    assert rig.records.learned == {}


async def test_a_private_address_is_asked_for_by_the_mac_of_the_neighbour_table() -> None:
    rig = Rig(listed=Scope.NETWORK)
    rig.answer(_FOUND, _EUI64)
    # A network's record says what it is, and not the request.
    assert await rig.look(_PRIVATE, Scope.ROUTER) == Denial.UNKNOWN
    assert rig.source.asked == []
    rig.mac = _MAC
    assert await rig.look(_PRIVATE) == "web"
    assert rig.source.asked == [(Scope.NETWORK, _NET, _EUI64)]
    assert rig.records.learned == {_PRIVATE: _LEARNED}


# Explained

_UNLISTED: Final = "no source reports how net is reached: its guests come through the unix listener"


async def test_a_guest_is_explained_with_its_listener_its_router_and_the_age_of_its_confirmation() -> (
    None
):
    rig = Rig()
    rig.answer(_FOUND)
    rig.source.freshness = "it is port p-1 of neutron, confirmed 3 s ago"
    told = await rig.explain()
    assert (told.verdict, told.answer, told.source) == ("found", None, "neutron")
    assert told.why == (
        _UNLISTED,
        "instance web has 10.0.0.5, known by address",
        "it is port p-1 of neutron, confirmed 3 s ago",
    )
    assert told.policy == {"upstream": "nova", "endpoint set": "default", "project": "blue"}
    rig.unix.serving = False
    told = await rig.explain()
    assert (told.verdict, told.answer, told.instance) == ("not-served", 503, "web")
    assert told.why[0] == f"{_UNLISTED}, which is off"
    rig.unix.problem = Problem("unix_listener.path", "an agent listens there")
    told = await rig.explain()
    assert told.why[0] == f"{_UNLISTED}, which is not served: an agent listens there"
    rig.answer(_FOUND, scope=Scope.ROUTER)
    told = await rig.explain(_BEHIND)
    assert (told.network, told.how) == ("router", "router")
    assert "router router leads to network net" in told.why
    assert told.policy["project"] == "blue"


_NAMED: Final = "net is no UUID"
_UUID: Final = "8f6a1e0c-3b52-4c1d-9a57-0d2f4b6c8e10"


@pytest.mark.parametrize(
    ("network", "answer", "status", "words"),
    [
        ("net", api.PortMissing(), 404, "has no port that may get metadata; it knows networks"),
        (_UUID, api.PortMissing(), 404, "neutron was asked and has no port that may get metadata"),
        (
            "net",
            api.PortAmbiguous(2),
            404,
            "2 ports of neutron have the address there; imdsproxy does not guess",
        ),
        ("net", api.LookUpUnavailable("refused"), 503, "neutron does not answer: refused"),
    ],
)
async def test_who_is_not_found_is_explained(
    network: str, answer: api.LookUp, status: int, words: str
) -> None:
    rig = Rig()
    rig.answer(answer)
    told = await rig.explain((NetworkId(network), _ADDRESS))
    assert (told.verdict, told.answer) == ("unknown", status)
    (step,) = [step for step in told.why if words in step]
    assert (_NAMED in step) == (network == "net" and isinstance(answer, api.PortMissing))
    rig.lookup.source = None
    told = await rig.explain((NetworkId("blue"), _ADDRESS))
    assert (told.verdict, told.answer) == ("no-network", 404)


def _origins(told: Explanation) -> dict[str, tuple[object, str]]:
    assert told.rules is not None
    assert (told.rules.token_epoch, told.rules.reopened_at) == (2, 41)
    set_somewhere = (one for one in told.rules.rules if one.origin != DEFAULT_ORIGIN)
    return {one.name: (one.value, one.origin) for one in set_somewhere}


async def test_rules_are_explained_by_the_network_or_the_router_that_the_guest_is_in_or_behind() -> (
    None
):
    sealed, hops = PolicyRules(seal_user_data=True), PolicyRules(hop_limit=2)
    book = PolicyBook(
        host=PolicyRules(hop_limit=1),
        networks={_NET: sealed, _ROUTER: hops},
        overrides={"web": OperatorOverride(2, 41)},
    )
    expected = {"hop_limit": (1, "host"), "seal_user_data": (True, "network")}
    rig, by_mac = Rig(_WEB), Rig(_WEB, listed=Scope.NETWORK)
    rig.records.policies = by_mac.records.policies = lambda: book
    assert _origins(await rig.explain()) == expected
    # The same by its MAC alone, which is nowhere noted.
    by_mac.mac = _MAC
    assert _origins(await by_mac.explain(_PRIVATE)) == expected
    rig.answer(_FOUND, scope=Scope.ROUTER)
    assert _origins(await rig.explain(_BEHIND)) == {"hop_limit": (2, "network")}
    assert (await rig.explain((_NET, IPv4Address("10.0.0.9")))).rules is None
