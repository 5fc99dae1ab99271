"""Who an unknown address is, where there is somebody to ask; and how that is explained."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv6Address
from types import SimpleNamespace
from typing import Any, Final

import pytest

from imdsproxy.admin.guests import GuestService
from imdsproxy.admin.reports import Explanation
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
    Scope,
    Upstream,
)
from imdsproxy.core.nova import EndpointSet, NovaRouting
from imdsproxy.core.observation import AddressKey, Conflict, Observation
from imdsproxy.core.plan import plan_record
from imdsproxy.core.policy import OperatorOverride, PolicyBook, PolicyRules, TokenMode
from imdsproxy.core.policy_report import DEFAULT_ORIGIN, PolicyInForce
from imdsproxy.core.wire import MapRecord, NovaRecord
from imdsproxy.errors import Problem
from imdsproxy.serving.resolver import Outcome
from imdsproxy.sources.api import (
    Confirmation,
    LookUp,
    LookUpUnavailable,
    PortAmbiguous,
    PortFound,
    PortMissing,
)
from support.fake_look_ups import FakeLookUps
from support.fake_mac_filters import no_mac_filters
from support.hand_clock import HandClock

_NET: Final = NetworkId("net")
_ROUTER: Final = NetworkId("router")
_ADDRESS: Final = IPv4Address("10.0.0.5")
_MAC: Final = MacAddress("fa:16:3e:00:00:05")
_EUI64: Final = IPv6Address("fe80::f816:3eff:fe00:5")
_PRIVATE: Final = IPv6Address("fe80::1234")
_FOUND: Final = PortFound(_NET, InstanceId("web"))
_WEB: Final = Instance(
    InstanceId("web"),
    "web",
    "web",
    project="blue",
    ports=(Port(_NET, _MAC, (_ADDRESS,)),),
    upstream=Upstream.NOVA,
)
_NOVA: Final = NovaRouting((EndpointSet("default", b"secret"),))


class _Neighbours:
    mac: MacAddress | None = None

    async def neighbour(self, network: Network, address: IpAddress) -> MacAddress | None:
        del network, address
        return self.mac


@dataclass
class _Records:
    """As much of the record loop as a look-up uses; everything is in force at once."""

    inventory: Inventory
    routing: NovaRouting = _NOVA
    learned: dict[AddressKey, Learned] = field(default_factory=dict)
    touched: list[AddressKey] = field(default_factory=list)
    tickets: Tickets = field(default_factory=Tickets)
    compiler: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(revisions={}))
    applier: None = None
    book: PolicyBook = field(default_factory=PolicyBook)

    def policies(self) -> PolicyBook:
        return self.book

    def learn(self, key: AddressKey, learned: Learned) -> int:
        self.learned[key] = learned
        return 0

    def forget(self, key: AddressKey) -> int:
        del self.learned[key]
        return 0

    def touch(self, key: AddressKey) -> int:
        self.touched.append(key)
        return 0

    def planned(self, key: AddressKey) -> MapRecord | Conflict | None:
        return plan_record(self.inventory, key, self.compiler.revisions, self.learned, self.routing)


class Rig:
    """A look-up whose source has published `web` before anybody asks, as it does when it finds it."""

    def __init__(self, *, told: bool = True, listed: Scope | None = None) -> None:
        self.inventory = Inventory(["neutron", "file"])
        self.source = FakeLookUps()
        self.records = _Records(self.inventory)
        self.neighbours = _Neighbours()
        self.lookup = Lookup(
            self.inventory,
            self.records,  # type: ignore[arg-type]  # the part that is used
            self.neighbours.neighbour,
            HandClock(),
            lambda: 30.0,
            no_mac_filters(self.inventory),
            self.source,
        )
        networks = {}
        if listed is not None:
            network = _NET if listed is Scope.NETWORK else _ROUTER
            networks = {network: Network(network, NamespaceListener("ns"), scope=listed)}
        self.inventory.observe(Observation("file", full=True, networks=networks))
        self.inventory.observe(Observation("neutron", full=True))
        self.told = told
        self.unix = SimpleNamespace(serving=True, problem=None)

    def answer(
        self, answer: object, address: IpAddress = _ADDRESS, scope: Scope = Scope.NETWORK
    ) -> None:
        network = _NET if scope is Scope.NETWORK else _ROUTER
        self.source.answers[scope, network, address] = answer  # type: ignore[assignment]

    def publish(self, *instances: Instance, source: str = "neutron") -> None:
        self.inventory.observe(
            Observation(
                source,
                full=True,
                instances={each.id: each for each in instances},
                implied_networks=frozenset({_NET}),
            )
        )

    async def look(self, key: AddressKey, scope: Scope | None = None) -> Outcome:
        return await self.lookup.look(key, scope)

    async def explain(
        self, network: NetworkId = _NET, address: IpAddress = _ADDRESS
    ) -> Explanation:
        parts: Any = SimpleNamespace(
            report=SimpleNamespace(endpoints=()),
            degraded=tuple,
            unix=self.unix,
            haproxy=SimpleNamespace(processes=None),
        )
        service = GuestService(self.lookup, parts, parts, parts, documents_needed=True)
        return await service.explain((network, address))


class _PublishingLookUps(FakeLookUps):
    """Publishes what it finds before it says so."""

    def __init__(self, rig: Rig) -> None:
        super().__init__(rig.source.answers)
        self._rig = rig

    async def look_up(self, scope: Scope, network: NetworkId, address: IpAddress) -> LookUp:
        answer = await super().look_up(scope, network, address)
        if isinstance(answer, PortFound):
            self._rig.publish(_WEB)
        return answer


def _rig(listed: Scope | None = None) -> Rig:
    rig = Rig(listed=listed)
    rig.source = _PublishingLookUps(rig)
    rig.lookup.source = rig.source
    return rig


def _record(outcome: Outcome) -> NovaRecord:
    assert isinstance(outcome, NovaRecord)
    return outcome


async def test_an_address_that_nobody_told_of_is_asked_for() -> None:
    rig = _rig()
    rig.answer(_FOUND)
    record = _record(await rig.look((_NET, _ADDRESS)))
    assert (record.instance, record.project) == ("web", "blue")
    assert rig.records.touched == [(_NET, _ADDRESS)]
    assert rig.records.learned == {}


@pytest.mark.parametrize("in_sync", [True, False])
@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (PortMissing(), Denial.UNKNOWN),
        (PortAmbiguous(2), Denial.UNKNOWN),
        (LookUpUnavailable("down"), Denial.UNAVAILABLE),
        # Found, and gone again: it is to be asked for once more.
        (_FOUND, Denial.UNAVAILABLE),
    ],
)
async def test_what_is_not_found_is_404_once_all_other_sources_have_reported(
    answer: object, expected: Denial, *, in_sync: bool
) -> None:
    rig = Rig()
    rig.answer(answer)
    rig.inventory.observe(Observation("file", in_sync=in_sync))
    assert await rig.look((_NET, _ADDRESS)) == (expected if in_sync else Denial.UNAVAILABLE)


@pytest.mark.parametrize("routing", [_NOVA, NovaRouting()])
async def test_an_address_that_is_known_is_not_asked_for(routing: NovaRouting) -> None:
    rig = _rig()
    rig.publish(_WEB)
    rig.records.routing = routing
    outcome = await rig.look((_NET, _ADDRESS))
    assert isinstance(outcome, NovaRecord) if routing is _NOVA else outcome is Denial.UNAVAILABLE
    assert rig.source.asked == []


async def test_an_address_that_another_source_claims_too_is_contested() -> None:
    rig = _rig()
    rig.answer(_FOUND)
    other = replace(_WEB, id=InstanceId("other"), upstream=Upstream.EMBEDDED)
    rig.answer(_FOUND, scope=Scope.ROUTER)
    rig.inventory.observe(Observation("file", full=True, instances={other.id: other}))
    assert await rig.look((_NET, _ADDRESS)) == Denial.CONFLICT
    # So it is behind a router.
    rig.publish(_WEB)
    assert await rig.look((_ROUTER, _ADDRESS), Scope.ROUTER) == Denial.CONFLICT


@pytest.mark.parametrize("listed", [None, Scope.ROUTER])
async def test_behind_a_router_the_address_is_learned_by_way_of_its_own_network(
    listed: Scope | None,
) -> None:
    rig = _rig(listed)
    rig.answer(_FOUND, scope=Scope.ROUTER)
    said = Scope.ROUTER if listed is None else None
    record = _record(await rig.look((_ROUTER, _ADDRESS), said))
    assert (record.instance, record.project) == ("web", "blue")
    assert rig.records.learned == {
        (_ROUTER, _ADDRESS): Learned(InstanceId("web"), math.inf, via=(_NET, _ADDRESS))
    }
    await rig.lookup.review()
    assert rig.records.learned


async def test_a_networks_record_says_what_it_is_not_the_request() -> None:
    rig = _rig(Scope.NETWORK)
    rig.answer(_FOUND)
    assert isinstance(await rig.look((_NET, _ADDRESS), Scope.ROUTER), NovaRecord)
    assert rig.source.asked == [(Scope.NETWORK, _NET, _ADDRESS)]


async def test_what_holds_no_more_behind_a_router_is_forgotten() -> None:
    rig = _rig()
    rig.answer(_FOUND, scope=Scope.ROUTER)
    await rig.look((_ROUTER, _ADDRESS), Scope.ROUTER)
    rig.source.routed.clear()
    await rig.lookup.review()
    assert rig.records.learned == {}


async def test_what_was_known_behind_routers_before_a_restart_is_known_again() -> None:
    rig = _rig()
    rig.source.routed[_ROUTER, _ADDRESS] = _FOUND
    rig.lookup.follow_routes()
    assert rig.records.learned[_ROUTER, _ADDRESS].via == (_NET, _ADDRESS)
    rig.source.routed[_ROUTER, _ADDRESS] = PortFound(_NET, InstanceId("db"))
    rig.lookup.follow_routes()
    assert rig.records.learned[_ROUTER, _ADDRESS].instance == "db"


async def test_a_private_link_local_address_is_asked_for_by_the_mac_of_the_neighbour_table() -> (
    None
):
    rig = _rig(Scope.NETWORK)
    rig.answer(_FOUND, _EUI64)
    assert await rig.look((_NET, _PRIVATE)) == Denial.UNKNOWN
    assert rig.source.asked == []
    rig.neighbours.mac = _MAC
    assert isinstance(await rig.look((_NET, _PRIVATE)), NovaRecord)
    assert rig.source.asked == [(Scope.NETWORK, _NET, _EUI64)]
    assert rig.records.learned == {(_NET, _PRIVATE): Learned(InstanceId("web"), 130.0, mac=_MAC)}


# Explained


async def test_a_guest_whom_no_listener_reaches_is_told_of_as_left_out() -> None:
    rig = _rig()
    rig.answer(_FOUND)
    rig.unix.serving = False
    told = await rig.explain()
    assert (told.verdict, told.answer, told.instance) == ("left-out", 503, "web")
    assert told.why[0].endswith("through the unix listener, which is off")
    rig.unix.problem = Problem("unix_listener.path", "an agent listens there")
    told = await rig.explain()
    assert told.why[0].endswith(", which is left out: an agent listens there")


@pytest.mark.parametrize(
    ("confirmed", "step"),
    [
        (Confirmation("p-1", 3.4, stale=False), "confirmed 3 s ago"),
        (
            Confirmation("p-1", 90, stale=True),
            "confirmed 90 s ago; stale since, because neutron does not answer",
        ),
    ],
)
async def test_a_guest_that_is_found_is_explained_with_the_age_of_its_confirmation(
    confirmed: Confirmation, step: str
) -> None:
    rig = _rig()
    rig.answer(_FOUND)
    rig.source.confirmed = confirmed
    found = await rig.explain()
    assert (found.verdict, found.answer, found.instance) == ("found", None, "web")
    assert (found.source, found.how) == ("neutron", "address")
    assert found.why == (
        "no source tells how net is reached: its guests come through the unix listener",
        "instance web has 10.0.0.5, known by address",
        f"it is port p-1 of neutron, {step}",
    )
    assert found.policy == {"upstream": "nova", "endpoint set": "default", "project": "blue"}


def _origins(told: PolicyInForce | None) -> dict[str, tuple[object, str]]:
    assert told is not None
    return {one.name: (one.value, one.origin) for one in told.rules if one.origin != DEFAULT_ORIGIN}


async def test_each_rule_is_told_with_the_scope_that_set_it_and_what_operators_did() -> None:
    rig = _rig()
    rig.records.book = PolicyBook(
        host=PolicyRules(tokens=TokenMode.REQUIRED, hop_limit=1, boot_grace_s=60),
        networks={_NET: PolicyRules(seal_user_data=True), _ROUTER: PolicyRules(hop_limit=2)},
        projects={
            "blue": PolicyRules(tokens=TokenMode.OPTIONAL),
            "red": PolicyRules(endpoint=False),
        },
        instances={"web": PolicyRules(refuse_forwarded=True)},
        overrides={"web": OperatorOverride(2, 41)},
    )
    said: dict[str, tuple[object, str]] = {
        "tokens": ("optional", "project"),
        "hop_limit": (1, "host"),
        "boot_grace_s": (60, "host"),
        "seal_user_data": (True, "network"),
        "refuse_forwarded": (True, "instance"),
    }
    rig.publish(_WEB)
    told = (await rig.explain()).rules
    assert _origins(told) == said
    assert told is not None
    assert (told.token_epoch, told.reopened_at) == (2, 41)
    assert (told.boot_ends_at, told.boot_over) == (101, False)
    # The same by its MAC alone, which is nowhere noted.
    declared = _rig(Scope.NETWORK)
    declared.records.book = rig.records.book
    declared.publish(_WEB)
    declared.neighbours.mac = _MAC
    assert _origins((await declared.explain(_NET, _PRIVATE)).rules) == said
    # Behind a router it is the router's policy that counts.
    rig.answer(_FOUND, scope=Scope.ROUTER)
    behind = (await rig.explain(_ROUTER, _ADDRESS)).rules
    del said["seal_user_data"]
    assert _origins(behind) == {**said, "hop_limit": (2, "network")}
    nobody = await rig.explain(_NET, IPv4Address("10.0.0.9"))
    assert nobody.rules is None


async def test_a_guest_behind_a_router_is_explained_by_the_router() -> None:
    rig = _rig()
    rig.answer(_FOUND, scope=Scope.ROUTER)
    told = await rig.explain(_ROUTER, _ADDRESS)
    assert (told.verdict, told.network, told.how) == ("found", "router", "router")
    assert "router router leads to network net" in told.why
    assert told.policy["project"] == "blue"


_UUID: Final = NetworkId("8f6a1e0c-3b52-4c1d-9a57-0d2f4b6c8e10")
_MISSING: Final = "neutron was asked and has no port that may get metadata"
_MAY_COME: Final = "requests are held for a while, then answered 404"


@pytest.mark.parametrize(
    ("network", "answer", "status", "why"),
    [
        (_UUID, PortMissing(), 404, (_MISSING, _MAY_COME)),
        (
            _NET,
            PortMissing(),
            404,
            (
                f"{_MISSING}; it knows networks and routers by their ids, and net is no UUID",
                _MAY_COME,
            ),
        ),
        (
            _NET,
            PortAmbiguous(2),
            404,
            ("2 ports of neutron have it there; whose guest asks is not guessed", _MAY_COME),
        ),
        (
            _NET,
            LookUpUnavailable("refused"),
            503,
            ("nothing is known of it, and neutron cannot be asked: refused",),
        ),
    ],
)
async def test_a_guest_that_is_not_found_is_explained(
    network: NetworkId, answer: object, status: int, why: tuple[str, ...]
) -> None:
    rig = _rig()
    rig.answer(answer)
    found = await rig.explain(network)
    assert (found.verdict, found.answer, found.why[1:]) == ("unknown", status, why)


async def test_without_anybody_to_ask_an_unknown_network_is_none() -> None:
    rig = Rig()
    rig.lookup.source = None
    told = await rig.explain()
    assert (told.verdict, told.answer) == ("no-network", 404)


def test_what_was_learned_before_a_restart_is_looked_for_among_addresses_without_an_owner() -> None:
    mac = MacAddress("fa:16:3e:00:00:06")
    by_mac = Instance(InstanceId("db"), "db", "db", ports=(Port(_NET, mac, ()),))
    rig = Rig(listed=Scope.NETWORK)
    rig.inventory.observe(
        Observation("neutron", full=True, instances={_WEB.id: _WEB, by_mac.id: by_mac})
    )
    asked: list[AddressKey] = []

    def granted(key: AddressKey) -> MacAddress:
        asked.append(key)
        return mac

    keys = [(_NET, _ADDRESS), (_NET, _EUI64), (_NET, _PRIVATE)]
    filters = SimpleNamespace(keys=lambda: iter(keys), granted=granted)
    rig.lookup.mac_filters = filters  # type: ignore[assignment]  # the part that is used
    rig.lookup.recall()
    assert asked == [(_NET, _PRIVATE)]
    assert rig.records.learned == {(_NET, _PRIVATE): Learned(by_mac.id, 100.0, mac=mac)}
