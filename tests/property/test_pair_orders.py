"""Whatever changes, and in whatever order: no MAC is let through to another instance's entry of HAProxy's map."""

import asyncio
import contextlib
from collections.abc import Callable, Collection, Coroutine, Mapping
from ipaddress import ip_address
from types import SimpleNamespace
from typing import Any, TypeAlias
from unittest.mock import MagicMock

from hypothesis import given, settings
from hypothesis import strategies as st

from imdsproxy.controller.compiler import RecordCompiler
from imdsproxy.controller.record_loop import RecordLoop
from imdsproxy.controller.record_plan import record_key
from imdsproxy.controller.rule_sets import RuleSets
from imdsproxy.controller.token_keys import TokenKeys
from imdsproxy.haproxy.rules.maps import MapState
from imdsproxy.host.clock import Clock
from imdsproxy.host.names import Naming
from imdsproxy.host.state import NamespaceRef, ObservedHost
from imdsproxy.model.entities import (
    METADATA_IPV4,
    Instance,
    InstanceId,
    IpAddress,
    MacAddress,
    NamespaceListener,
    Network,
    NetworkId,
    Port,
)
from imdsproxy.model.identity import Learned
from imdsproxy.model.inventory import Inventory
from imdsproxy.model.observation import AddressKey, Observation
from imdsproxy.network.anti_spoofing.mac_filters import MacFilters
from imdsproxy.network.anti_spoofing.plan import ANY_MAC, Pairs, plan_pair
from imdsproxy.network.planned import Endpoint
from support.fake_mac_filters import FakeMacFilters, MemoryJournal, no_hop_limits

_NET = NetworkId("n")
_ADDRESSES = [ip_address(text) for text in ("10.0.0.1", "10.0.0.2", "2001:db8::1")]
_MACS = [MacAddress(f"52:54:00:00:00:0{number}") for number in (1, 2, 3)]
_PLACE = NamespaceRef("ns", 7)
_ENDPOINT = Endpoint(_NET, METADATA_IPV4, 80, "eth0", _PLACE, 2)

_ports = st.builds(
    Port,
    st.just(_NET),
    st.none() | st.sampled_from(_MACS),
    st.lists(st.sampled_from(_ADDRESSES), max_size=2, unique=True).map(tuple),
)
_records = st.dictionaries(st.sampled_from(["a", "b", "c"]), _ports, max_size=3)


class Noting(MacFilters):
    """What a round of the record loop wants: the inventory may say something newer by now."""

    planned: Pairs
    on_staying: Callable[[AddressKey, MacAddress | None, MacAddress | None], None]

    async def withdraw(self, pairs: Pairs, staying: Collection[AddressKey] = ()) -> None:
        before = {key: self.granted(key) for key in self.keys()}
        self.planned = {**before, **pairs}
        # The exchange waits for its turn: until then both MACs are the instance's.
        for key in staying:
            self.on_staying(key, before.get(key), pairs[key])
        await super().withdraw(pairs, staying)
        for key in staying:
            self.on_staying(key, pairs[key], pairs[key])


class World:
    """Maps and filters, checked after every single change of either."""

    working: asyncio.Task[None]

    def __init__(self) -> None:
        self.map: dict[str, str] = {}
        self.owners: dict[str, tuple[str, set[MacAddress | None]]] = {}
        self.inventory = Inventory(["s"])
        self.kernel = FakeMacFilters(watch=self.look)
        self.filters = Noting(self.kernel, self.inventory, Naming(), MemoryJournal(), Clock())
        self.filters.on_staying = self.stay
        self.staying: dict[str, str] = {}
        # The parts that are used: of what is on disk, nothing.
        applier: Any = SimpleNamespace(apply=self.apply, state=MapState(base=self.map))
        nothing: Any = MagicMock(directory="/nonexistent")
        nothing.find.return_value = {}
        self.records = RecordLoop(
            self.inventory,
            applier,
            RecordCompiler(self.inventory, nothing, nothing),
            Clock(),
            lambda _networks: None,
            lambda _keys: None,
            self.filters,
            no_hop_limits(),
            RuleSets(applier, Clock()),
            TokenKeys(nothing),
        )

    def stay(self, key: AddressKey, *macs: MacAddress | None) -> None:
        """The instance that has the address may have each of these MACs from now on."""
        name = record_key(key)
        self.staying[name] = self.owners[name][0]
        self.owners[name] = self.staying[name], {*macs}

    async def apply(self, wanted: Mapping[str, str | None]) -> int:
        staying, self.staying = self.staying, {}
        for key, value in wanted.items():
            await asyncio.sleep(0)
            assert key not in staying or str(value).startswith(f"{staying[key]}|")
            if value is None:
                self.map.pop(key, None)
            else:
                self.map[key] = value
                address = ip_address(key.partition("/")[2])
                self.owners[key] = (
                    value.partition("|")[0],
                    {self.filters.planned.get((_NET, address))},
                )
            self.look()
        return len(wanted)

    def look(self) -> None:
        for network, table in self.kernel.tables.items():
            for address, mac in table.items():
                key = record_key((network, address))
                value = self.map.get(key)
                if value is None or value == "!":
                    continue
                owner, expected = self.owners[key]
                assert value.startswith(f"{owner}|")
                assert {mac, ANY_MAC, None} & expected, (key, mac, owner, expected)

    async def say(self, ports: Mapping[str, Port], *, checked: bool) -> None:
        network = Network(_NET, NamespaceListener("ns"), mac_check=checked)
        instances = {
            InstanceId(name): Instance(InstanceId(name), name, name, ports=(port,))
            for name, port in ports.items()
        }
        self.records.observe(
            Observation("s", full=True, networks={_NET: network}, instances=instances)
        )

    async def learn(self, address: IpAddress, name: str, mac: MacAddress) -> None:
        self.records.learn((_NET, address), Learned(InstanceId(name), 0.0, mac=mac))

    async def listen(self) -> None:
        plan = await self.filters.open(
            self.inventory.networks, [_ENDPOINT], ObservedHost(), running=True
        )
        await asyncio.sleep(0)
        await self.filters.settle(plan, sweep=True)

    async def lose(self) -> None:
        self.kernel.lose(_NET)
        self.filters.lost("")

    async def settle(self) -> None:
        settled = asyncio.ensure_future(self.records.tickets.wait(self.records.tickets.given))
        await asyncio.wait((settled, self.working), return_when=asyncio.FIRST_COMPLETED)
        settled.cancel()
        if self.working.done():
            self.working.result()

    async def expire(self) -> None:
        self.filters._lingering = dict.fromkeys(self.filters._lingering, 0.0)
        await self.filters.expire()


_Step: TypeAlias = Callable[[World], Coroutine[object, object, None]]
_steps: st.SearchStrategy[_Step] = st.one_of(
    st.builds(
        lambda ports, checked: lambda world: world.say(ports, checked=checked),
        _records,
        st.sampled_from([True, True, True, False]),
    ),
    st.builds(
        lambda *learned: lambda world: world.learn(*learned),
        st.sampled_from(_ADDRESSES),
        st.sampled_from(["a", "b"]),
        st.sampled_from(_MACS),
    ),
    st.sampled_from([World.listen, World.lose, World.settle, World.expire]),
)


@settings(max_examples=settings().max_examples * 3, deadline=None)
@given(st.lists(st.tuples(_steps, st.booleans()), min_size=3, max_size=25))
def test_no_entry_is_reached_by_another_s_mac(steps: list[tuple[_Step, bool]]) -> None:
    async def run() -> World:
        world = World()
        working = world.working = asyncio.create_task(world.records.run())
        beside = []
        try:
            for step, wait in steps:
                task = asyncio.create_task(step(world))
                if wait:
                    await task
                else:
                    beside.append(task)
            await asyncio.gather(*beside)
            await world.listen()
            await world.settle()
            # One that was taken away meanwhile is back, and all agree.
            await world.listen()
        finally:
            working.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await working
        return world

    world = asyncio.run(run())
    wanted = {
        address: mac
        for (_, address) in {*world.filters.keys(), *((_NET, one) for one in _ADDRESSES)}
        if (mac := plan_pair(world.inventory, (_NET, address), world.records.learned)) is not None
    }
    held = world.kernel.tables.get(_NET)
    if held is not None:
        lingering = {address for _, address in world.filters._lingering}
        assert {a: m for a, m in held.items() if a not in lingering} == wanted
