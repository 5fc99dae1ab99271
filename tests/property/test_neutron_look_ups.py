"""Whatever ports there are and however they change: a look-up names only who has the address now."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import Any, Final, TypeAlias

from hypothesis import given, settings
from hypothesis import strategies as st

from imdsproxy.config.sources import NeutronSourceSettings
from imdsproxy.model.addresses import link_local_of
from imdsproxy.model.entities import IpAddress, MacAddress, NetworkId, Scope
from imdsproxy.model.observation import Conflict
from imdsproxy.sources.api import LookUp, PortAmbiguous, PortFound, PortMissing
from imdsproxy.sources.neutron.ports import ROUTER_OWNERS, NeutronPort
from support.fake_neutron import DOWN, Rig, neutron_rig, router_port

_NETWORKS: Final = tuple(map(NetworkId, ("n1", "n2")))
_ROUTER: Final = NetworkId("r1")
_MACS: Final = tuple(MacAddress(f"fa:16:3e:00:00:0{number}") for number in range(2))
_PLAIN: Final = tuple(map(ip_address, ("10.0.0.1", "10.0.0.2", "fd00::1")))
_ADDRESSES: Final[tuple[IpAddress, ...]] = (*_PLAIN, *map(link_local_of, _MACS))
_SETTINGS: Final = NeutronSourceSettings(negative_ttl_s=2, refresh_s=5, lifetime_s=30)


@dataclass(frozen=True, slots=True)
class Look:
    scope: Scope
    network: NetworkId
    address: IpAddress


_ids = st.integers(0, 5).map("p-{}".format)
_guests = st.builds(
    NeutronPort,
    id=_ids,
    network=st.sampled_from(_NETWORKS),
    mac=st.none() | st.sampled_from(_MACS),
    addresses=st.lists(st.sampled_from(_PLAIN), min_size=1, max_size=2, unique=True).map(tuple),
    device=st.sampled_from(("i-1", "i-2", "i-3", "i-1", "i-2", "i-3", "", "a|b")),
    owner=st.sampled_from(("compute:nova", "compute:nova", "compute:nova", "", "network:dhcp")),
    project=st.sampled_from(("blue", "red")),
)
_interfaces = st.builds(
    NeutronPort,
    id=st.integers(0, 2).map("r-{}".format),
    network=st.sampled_from(_NETWORKS),
    mac=st.none(),
    addresses=st.just(()),
    device=st.just(_ROUTER),
    owner=st.sampled_from((*ROUTER_OWNERS, *ROUTER_OWNERS, "network:router_gateway")),
    project=st.just("blue"),
)
_JOINED: Final = tuple(
    router_port(f"r-{number}", network, _ROUTER) for number, network in enumerate(_NETWORKS)
)
"""At first the router joins all networks: else little would be behind it."""

_looks = st.builds(
    lambda place, address: Look(place[0], place[1], address),
    st.sampled_from([*[(Scope.ROUTER, _ROUTER)] * 2, *((Scope.NETWORK, one) for one in _NETWORKS)]),
    st.sampled_from(_ADDRESSES),
)


class World:
    """A source beside its Neutron, which is kept as a real one: no address twice in a network."""

    def __init__(self, rig: Rig) -> None:
        self.neutron, self.time = rig.neutron, rig.time
        self.source, self.heard = rig.source, rig.heard

    async def put(self, port: NeutronPort) -> None:
        for other in tuple(self.neutron.ports_by_id.values()):
            if other.network == port.network and other.id != port.id:
                left = tuple(each for each in other.addresses if each not in port.addresses)
                mac = None if other.mac == port.mac else other.mac
                self.neutron.put(replace(other, addresses=left, mac=mac))
        self.neutron.put(port)

    def networks(self, look: Look) -> frozenset[NetworkId]:
        if look.scope is Scope.NETWORK:
            return frozenset({look.network})
        return frozenset(
            port.network
            for port in self.neutron.ports_by_id.values()
            if port.device == look.network and port.owner in ROUTER_OWNERS
        )

    def having(self, look: Look) -> list[NeutronPort]:
        networks = self.networks(look)
        return [
            port
            for port in self.neutron.ports_by_id.values()
            if port.network in networks and (port.network, look.address) in port.keys
        ]

    async def remove(self, number: int) -> None:
        if ports := sorted(self.neutron.ports_by_id):
            self.neutron.remove(ports[number % len(ports)])

    async def pass_time(self, seconds: int) -> None:
        await self.time.advance(seconds)

    async def look_up(self, look: Look) -> LookUp:
        return await self.source.look_up(look.scope, look.network, look.address)

    async def do(self, step: Step) -> None:
        act, argument = step
        await act(self, argument)
        owners = (owner for _, owner in self.heard.inventory.addresses())
        assert not any(isinstance(owner, Conflict) for owner in owners)

    def check_inventory(self) -> None:
        """Everything in force is of a port that Neutron has, with its own project."""
        ports = self.neutron.ports_by_id.values()
        for (network, address), owner in self.heard.inventory.addresses():
            assert isinstance(owner, str)
            instance = self.heard.inventory.instances[owner]
            mine = next(
                port
                for port in instance.ports
                if port.network == network
                and (address in port.addresses or (port.mac and link_local_of(port.mac) == address))
            )
            project = mine.project or instance.project
            assert any(
                port.serves
                and port.network == network
                and (port.network, address) in port.keys
                and (port.device, port.project) == (owner, project)
                for port in ports
            )


Step: TypeAlias = tuple[Callable[[World, Any], Awaitable[object]], object]
_steps: st.SearchStrategy[Step] = st.one_of(
    *[st.tuples(st.just(World.look_up), _looks)] * 2,
    st.tuples(st.just(World.put), _guests),
    st.tuples(st.just(World.put), _guests | _interfaces),
    st.tuples(st.just(World.remove), st.integers(0, 9)),
    st.tuples(st.just(World.pass_time), st.integers(1, 8)),
)


def _play(play: Callable[[World], Awaitable[None]]) -> None:
    async def run() -> None:
        async with neutron_rig(*_JOINED, settings=_SETTINGS) as rig:
            rig.random[0] = 0.5
            await play(World(rig))

    asyncio.run(run())


@settings(max_examples=settings().max_examples * 3 // 2, deadline=None)
@given(
    st.lists(_guests | _interfaces, max_size=8),
    st.sets(st.sampled_from(("networks", "addresses", "macs", "owners", "devices"))),
    _looks,
)
def test_a_look_up_names_exactly_the_one_port_that_has_the_address_there(
    ports: list[NeutronPort], ignored: set[str], look: Look
) -> None:
    async def play(world: World) -> None:
        for port in ports:
            await world.put(port)
        world.neutron.ignored = frozenset(ignored)
        answer = await world.look_up(look)
        having = world.having(look)
        match answer:
            case PortFound():
                (port,) = having
                assert port.serves
                assert (answer.network, answer.instance) == (port.network, port.device)
            case PortMissing():
                assert not having or (len(having) == 1 and not having[0].serves)
            case PortAmbiguous(count=count):
                assert count == len(having) > 1
            case _:
                raise AssertionError(answer)
        world.check_inventory()

    _play(play)


@given(st.lists(_steps, max_size=30), st.lists(_looks, min_size=1, max_size=6))
def test_once_neutron_has_stood_still_for_a_refresh_everything_is_as_it_says(
    steps: list[Step], looks: list[Look]
) -> None:
    async def play(world: World) -> None:
        for step in steps:
            await world.do(step)
        await world.time.advance(2 * _SETTINGS.refresh_s)
        world.check_inventory()
        for look in looks:
            having = world.having(look)
            answer = await world.look_up(look)
            if isinstance(answer, PortFound):
                (port,) = having
                assert (answer.network, answer.instance) == (port.network, port.device)
            else:
                assert len(having) != 1 or not having[0].serves
        world.check_inventory()
        for (router, address), found in world.source.routes().items():
            (port,) = world.having(Look(Scope.ROUTER, router, address))
            assert (found.network, found.instance) == (port.network, port.device)

    _play(play)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(_guests | _interfaces, max_size=8),
    st.lists(_looks, max_size=8),
    st.lists(_steps, max_size=12),
)
def test_while_neutron_does_not_answer_nothing_that_is_known_changes(
    ports: list[NeutronPort], looks: list[Look], steps: list[Step]
) -> None:
    async def play(world: World) -> None:
        for port in ports:
            await world.put(port)
        for look in looks:
            await world.do((World.look_up, look))
        before, routes = world.heard.owners, dict(world.source.routes())
        world.neutron.failure = DOWN
        for step in steps:
            await world.do(step)
        assert world.heard.owners == before
        assert dict(world.source.routes()) == routes

    _play(play)
