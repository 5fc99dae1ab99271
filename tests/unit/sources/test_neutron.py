"""The source `neutron` against a Neutron in memory, on a clock that stands still."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from pathlib import Path

import pytest

from imdsproxy.core.addresses import link_local_of
from imdsproxy.core.model import (
    InstanceId,
    MacAddress,
    NetworkId,
    Scope,
    Upstream,
)
from imdsproxy.core.observation import StrandedPort
from imdsproxy.sources.api import (
    LookUp,
    LookUpUnavailable,
    PortAmbiguous,
    PortFound,
    PortMissing,
)
from imdsproxy.sources.neutron.ports import NeutronPort, PortQuery
from imdsproxy.sources.neutron.source import NeutronSource
from imdsproxy.sources.settings import NeutronSourceSettings
from support.fake_neutron import (
    DOWN,
    LATE,
    FakeNeutron,
    FakeTime,
    neutron_port,
    router_port,
)
from support.source_runs import Heard, running

_MAC = "fa:16:3e:00:00:05"
_ELSEWHERE = "fa:16:3e:00:00:06"
_A = neutron_port("p-a", "n1", "10.0.0.5", "fd00::5", device="i-a", mac=_MAC)
_B = neutron_port("p-b", "n1", "10.0.0.6", device="i-b")
_FOUND_A = PortFound(NetworkId("n1"), InstanceId("i-a"))
_MISSING = PortMissing()


@dataclass
class Rig:
    """A source that runs, and what it is made of."""

    neutron: FakeNeutron
    time: FakeTime
    source: NeutronSource
    heard: Heard
    random: list[float] = field(default_factory=lambda: [1.0])
    sleepers: int = 1

    async def look(self, network: str, address: str, *, router: bool = False) -> LookUp:
        scope = Scope.ROUTER if router else Scope.NETWORK
        return await self.source.look_up(scope, NetworkId(network), ip_address(address))

    async def pass_time(self, seconds: float, step: float = 1.0) -> None:
        await self.time.advance(seconds, step=step, sleepers=self.sleepers)

    @property
    def asked(self) -> int:
        """Queries since the last time that this was read."""
        number = len(self.neutron.queries)
        self.neutron.queries.clear()
        return number

    @property
    def owners(self) -> dict[str, str]:
        return self.heard.owners

    def in_sync(self) -> bool:
        return self.heard.last.in_sync


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "neutron.sqlite"


@contextlib.asynccontextmanager
async def rig(
    kept: Path,
    *ports: object,
    settings: NeutronSourceSettings | None = None,
    neutron: FakeNeutron | None = None,
    time: FakeTime | None = None,
    begin: asyncio.Event | None = None,
) -> AsyncIterator[Rig]:
    settings = settings or NeutronSourceSettings()
    neutron = neutron or FakeNeutron()
    neutron.put(*ports)  # type: ignore[arg-type]
    time = time or FakeTime()
    chances = [1.0]
    source = NeutronSource(
        neutron,
        kept,
        settings,
        clock=time,
        random=lambda: chances[0],
        sleep=time.sleep,
        begin=None if begin is None else begin.wait,
    )
    async with running(source) as heard:
        sleepers = 2 if settings.list_every_s else 1
        made = Rig(neutron, time, source, heard, chances, sleepers)
        if begin is None:
            await time.settle(sleepers)
            neutron.queries.clear()
        yield made


async def test_a_source_that_knows_nothing_is_in_sync_and_finds_out_whether_neutron_answers(
    kept: Path,
) -> None:
    neutron = FakeNeutron()
    async with rig(kept, neutron=neutron) as one:
        (first,) = one.heard.observations
        assert first.full
        assert first.in_sync
        assert not first.instances
        assert one.source.queries.results == {"ok": 1}
        await one.pass_time(30)
        assert one.asked == 0


async def test_before_it_is_to_begin_neutron_is_asked_for_guests_alone(kept: Path) -> None:
    begin = asyncio.Event()
    async with rig(kept, _A, begin=begin) as one:
        await one.heard.until(lambda heard: heard.last.in_sync)
        assert await one.look("n1", "10.0.0.5") == _FOUND_A
        assert one.asked == 1
        begin.set()
        await one.pass_time(10)
        assert one.asked == 1


async def test_a_list_without_which_nothing_is_known_is_read_at_once(kept: Path) -> None:
    async with rig(kept, _A, settings=_LISTED, begin=asyncio.Event()) as one:
        await one.heard.until(lambda heard: heard.last.in_sync)
        assert one.owners["n1/10.0.0.5"] == "i-a"


async def test_an_address_is_found_and_in_force_before_it_is_answered(kept: Path) -> None:
    async with rig(kept, _A, _B) as one:
        assert await one.look("n1", "10.0.0.5") == _FOUND_A
        (found,) = one.heard.inventory.instances.values()
        assert (found.id, found.project, found.upstream) == ("i-a", "blue", Upstream.NOVA)
        assert one.owners == {
            "n1/10.0.0.5": "i-a",
            "n1/fd00::5": "i-a",
            f"n1/{link_local_of(MacAddress(_MAC))}": "i-a",
        }
        assert one.heard.last.implied_networks == {"n1"}
        (query,) = one.neutron.queries
        assert query.networks == ("n1",)
        assert query.addresses == (ip_address("10.0.0.5"),)


@pytest.mark.parametrize("address", ["::ffff:10.0.0.5", "fd00:0:0::5", "fe80::f816:3eff:fe00:5"])
async def test_any_address_of_a_port_finds_it(kept: Path, address: str) -> None:
    async with rig(kept, _A) as one:
        assert await one.look("n1", address) == _FOUND_A
        assert one.asked == 1
        assert await one.look("n1", "10.0.0.5") == _FOUND_A
        assert one.asked == 0


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({"device": ""}, None),
        ({"owner": "network:dhcp"}, None),
        ({"owner": "network:distributed", "device": "ovnmeta-n1"}, None),
        ({"owner": "network:router_interface"}, None),
        ({"owner": "network:floatingip"}, None),
        ({"device": "a|b"}, "device_id"),
        ({"device": "a\n"}, "device_id"),
        ({"device": "x" * 65}, "device_id"),
        ({"device": "-a"}, "device_id"),
        ({"project": "a b"}, "project_id"),
        ({"project": ""}, "project_id"),
    ],
)
async def test_a_port_that_names_no_instance_of_nova_gets_nothing_and_what_is_no_id_is_reported(
    kept: Path, change: dict[str, str], refused: str | None
) -> None:
    async with rig(kept, replace(_A, **change)) as one:  # type: ignore[arg-type]
        assert await one.look("n1", "10.0.0.5") == _MISSING
        assert not one.owners
        fields = [problem.field for problem in one.heard.last.problems]
        assert fields == ([] if refused is None else [f"ports.p-a.{refused}"])
        # What is refused is reported for a while: nothing looks at it again by itself.
        await one.pass_time(301, step=60)
        assert not one.heard.last.problems
        one.neutron.put(_A)
        assert await one.look("n1", "10.0.0.5") == _FOUND_A


async def test_a_link_local_address_that_no_mac_makes_costs_no_query(kept: Path) -> None:
    async with rig(kept, _A) as one:
        assert await one.look("n1", "fe80::1234") == _MISSING
        assert one.asked == 0


# Routers


@pytest.mark.parametrize(
    "owner",
    [
        "network:router_interface",
        "network:ha_router_replicated_interface",
        "network:router_interface_distributed",
    ],
)
async def test_behind_a_router_all_its_networks_are_looked_at(kept: Path, owner: str) -> None:
    joined = [router_port("r-1", "n1", "r", owner), router_port("r-2", "n2", "r", owner)]
    async with rig(kept, *joined, _A) as one:
        assert await one.look("r", "10.0.0.5", router=True) == _FOUND_A
        assert one.asked == 2
        assert one.owners["n1/10.0.0.5"] == "i-a"
        assert one.source.routes() == {(NetworkId("r"), ip_address("10.0.0.5")): _FOUND_A}
        assert await one.look("r", "10.0.0.5", router=True) == _FOUND_A
        assert one.asked == 0
        assert await one.look("r", "fe80::f816:3eff:fe00:5", router=True) == _FOUND_A


@pytest.mark.parametrize("ignored", [(), ("owners",), ("owners", "devices")])
async def test_a_routers_gateway_network_is_none_of_its_networks(
    kept: Path, ignored: tuple[str, ...]
) -> None:
    gateway = router_port("r-1", "n1", "r", "network:router_gateway")
    async with rig(kept, gateway, _A) as one:
        one.neutron.ignored = frozenset(ignored)
        for router in ("r", "other"):
            assert await one.look(router, "10.0.0.5", router=True) == _MISSING


async def test_an_address_in_two_of_a_routers_networks_is_refused(kept: Path) -> None:
    twin = neutron_port("p-t", "n2", "10.0.0.5", device="i-t")
    joined = [router_port("r-1", "n1", "r"), router_port("r-2", "n2", "r")]
    async with rig(kept, *joined, _A, twin) as one:
        assert await one.look("r", "10.0.0.5", router=True) == PortAmbiguous(2)
        assert await one.look("r", "10.0.0.5", router=True) == PortAmbiguous(2)
        assert one.asked == 2
        assert not one.owners


async def test_a_router_of_many_networks_is_asked_in_parts(kept: Path) -> None:
    joined = [router_port(f"r-{number}", f"n{number:02}", "r") for number in range(40)]
    guest = neutron_port("p-a", "n39", "10.0.0.5", device="i-a")
    async with rig(kept, *joined, guest) as one:
        assert await one.look("r", "10.0.0.5", router=True) == PortFound(
            NetworkId("n39"), InstanceId("i-a")
        )
        assert max(len(query.networks) for query in one.neutron.queries) <= 32


# Many at once, and negative answers


async def test_a_hundred_misses_of_one_address_are_one_query(kept: Path) -> None:
    async with rig(kept, _A) as one:
        one.neutron.open.clear()
        looks = [asyncio.create_task(one.look("n1", "10.0.0.5")) for _ in range(100)]
        await asyncio.sleep(0.01)
        looks[0].cancel()
        one.neutron.open.set()
        # One that gave up, be it the first, does not take the answer from the others.
        assert await asyncio.gather(*looks[1:]) == [_FOUND_A] * 99
        assert looks[0].cancelled()
        assert one.asked == 1
        assert one.source.look_ups["coalesced"] == 99


async def test_all_behind_a_router_wait_for_one_question_about_its_networks(kept: Path) -> None:
    async with rig(kept, _A) as one:
        looks = [one.look("r", f"10.0.0.{number}", router=True) for number in range(40)]
        assert await asyncio.gather(*looks) == [_MISSING] * 40
        assert one.asked == 1


async def test_guests_behind_a_router_do_not_wait_for_all_that_is_asked_again(kept: Path) -> None:
    guests = [neutron_port(f"p-{each:03}", "n1", f"10.0.1.{each}") for each in range(200)]
    settings = NeutronSourceSettings(max_queries=2)
    async with rig(kept, router_port("r-1", "n1", "r"), *guests, settings=settings) as one:
        for number in range(200):
            await one.look("r", f"10.0.1.{number}", router=True)
        await one.pass_time(8)
        one.neutron.queries.clear()
        one.neutron.open.clear()
        refreshing = asyncio.create_task(one.pass_time(2))
        await asyncio.sleep(0.02)
        look = asyncio.create_task(one.look("r", "10.0.2.1", router=True))
        await asyncio.sleep(0.02)
        assert [bool(query.devices) for query in one.neutron.queries] == [False, True]
        one.neutron.open.set()
        assert await look == _MISSING
        await refreshing


@pytest.mark.parametrize(("ttl", "believed"), [(3.0, 1), (0.0, 0)])
async def test_a_negative_answer_is_believed_for_seconds(
    kept: Path, ttl: float, believed: int
) -> None:
    async with rig(kept, settings=NeutronSourceSettings(negative_ttl_s=ttl)) as one:
        assert await one.look("n1", "10.0.0.5") == _MISSING
        await one.pass_time(2)
        assert await one.look("n1", "10.0.0.5") == _MISSING
        assert one.asked == 2 - believed
        one.neutron.put(_A)
        await one.pass_time(ttl)
        assert await one.look("n1", "10.0.0.5") == _FOUND_A
        results = one.source.look_ups
        assert (results["missing"], results["found"]) == (2 - believed, 1)
        assert results.get("negative-cached", 0) == believed


async def test_no_more_queries_at_once_than_the_settings_say(kept: Path) -> None:
    guests = [
        neutron_port(f"p-{number:03}", f"n{number}", "10.0.0.5", device=f"i-{number}")
        for number in range(50)
    ]
    async with rig(kept, *guests, settings=NeutronSourceSettings(max_queries=5)) as one:
        one.neutron.open.clear()
        looks = [asyncio.create_task(one.look(f"n{number}", "10.0.0.5")) for number in range(50)]
        await asyncio.sleep(0.01)
        one.neutron.open.set()
        assert all(isinstance(each, PortFound) for each in await asyncio.gather(*looks))
        assert one.neutron.most_at_once == 5


async def test_a_network_that_invents_addresses_leaves_room_for_the_others(kept: Path) -> None:
    other = neutron_port("p-c", "n2", "10.0.0.5", device="i-c")
    async with rig(kept, other, settings=NeutronSourceSettings(max_queries=4)) as one:
        one.neutron.open.clear()
        invented = [
            asyncio.create_task(one.look("n1", f"10.{number >> 8}.{number & 255}.9"))
            for number in range(1000)
        ]
        await asyncio.sleep(0.05)
        honest = asyncio.create_task(one.look("n2", "10.0.0.5"))
        await asyncio.sleep(0.01)
        asked = [str(query.networks[0]) for query in one.neutron.queries]
        assert asked == ["n1", "n1", "n2"]
        one.neutron.open.set()
        assert await honest == PortFound(NetworkId("n2"), InstanceId("i-c"))
        answers = await asyncio.gather(*invented)
        assert {type(each) for each in answers} == {PortMissing, LookUpUnavailable}
        assert one.source.queries.stale_s == 0
        # What stands for a network or router goes with its last question.
        await one.look("r", "10.0.0.5", router=True)
        queries = one.source.queries
        assert not [*queries._shares, *queries._waiting, *queries._asking]


# Kept up to date


async def test_ports_in_use_are_asked_for_again_many_with_one_query(kept: Path) -> None:
    guests = [
        neutron_port(f"p-{number:03}", "n1", f"10.0.1.{number}", device=f"i-{number}")
        for number in range(62)
    ]
    async with rig(kept, router_port("r-1", "n1", "r"), *guests) as one:
        for number in range(62):
            await one.look("n1", f"10.0.1.{number}")
        reported = len(one.heard.observations)
        assert one.asked == 62
        await one.pass_time(10)
        assert one.asked == 2
        assert len(one.heard.observations) == reported
        for number in range(62):
            assert isinstance(await one.look("r", f"10.0.1.{number}", router=True), PortFound)
        assert one.asked == 63
        await one.pass_time(10)
        assert one.asked <= 10
        assert len(one.source.routes()) == 62


async def test_a_neutron_that_shows_nothing_for_a_moment_takes_nothing_away(kept: Path) -> None:
    """One that starts does: while a thread reads the policy's rules, others leave every port out."""
    joined = router_port("r-1", "n1", "r")
    async with rig(kept, _A, _B, joined) as one:
        await one.look("n1", "10.0.0.5")
        await one.look("r", "10.0.0.6", router=True)
        before = one.owners
        hidden = dict(one.neutron.ports_by_id)
        await one.pass_time(9)
        one.neutron.ports_by_id.clear()
        await one.pass_time(2)
        assert one.asked
        one.neutron.put(*hidden.values())
        await one.pass_time(20)
        assert one.owners == before
        assert one.source.routes()
        one.neutron.ports_by_id.clear()
        await one.pass_time(14)
        assert not one.owners
        assert not one.source.routes()


async def test_what_a_neutron_leaves_out_before_and_after_an_outage_is_still_there(
    kept: Path,
) -> None:
    """One that starts again and again shows nothing each time, and never what there is."""
    joined = router_port("r-1", "n1", "r")
    async with rig(kept, _A, _B, joined) as one:
        await one.look("n1", "10.0.0.5")
        await one.look("r", "10.0.0.6", router=True)
        before = one.owners
        # It is asked again with the next tick.
        one.random[0] = 0.0
        await one.pass_time(9)
        one.neutron.ports_by_id.clear()
        for _ in range(4):
            await one.pass_time(2)
            one.neutron.failure = DOWN
            await one.pass_time(2)
            one.neutron.failure = None
            assert one.owners == before
        assert one.source.routes()


async def test_a_negative_answer_is_not_believed_of_a_neutron_that_has_just_come_back(
    kept: Path,
) -> None:
    async with rig(kept, _A) as one:
        one.neutron.failure = DOWN
        await one.look("n1", "10.0.0.5")
        one.neutron.failure = None
        hidden = one.neutron.ports_by_id.pop("p-a")
        await one.pass_time(3)
        assert isinstance(await one.look("n1", "10.0.0.5"), LookUpUnavailable)
        # One that it shows may be the one without an instance, beside the guest's.
        one.neutron.put(neutron_port("p-x", "n1", "10.0.0.5", device=""))
        assert isinstance(await one.look("n1", "10.0.0.5"), LookUpUnavailable)
        one.neutron.remove("p-x")
        one.neutron.put(hidden)
        assert await one.look("n1", "10.0.0.5") == _FOUND_A
        await one.pass_time(3)
        assert await one.look("n1", "10.0.0.6") == _MISSING


async def test_a_port_is_gone_only_if_neutron_says_so_while_it_shows_another(kept: Path) -> None:
    async with rig(kept, _A, _B) as one:
        await one.look("n1", "10.0.0.5")
        await one.look("n1", "10.0.0.6")
        one.neutron.remove("p-a")
        one.neutron.queries.clear()
        await one.pass_time(9)
        assert one.owners == {"n1/10.0.0.6": "i-b"}
        assert [query.ids for query in one.neutron.queries] == [("p-a", "p-b"), ("p-a", "p-b")]


@pytest.mark.parametrize("change", ["second port", "leaves", "moves"])
async def test_what_is_behind_a_router_is_looked_at_again(kept: Path, change: str) -> None:
    joined = [router_port("r-1", "n1", "r"), router_port("r-2", "n2", "r")]
    async with rig(kept, *joined, _A) as one:
        await one.look("r", "10.0.0.5", router=True)
        await one.pass_time(20)
        assert one.source.routes()
        if change == "second port":
            one.neutron.put(neutron_port("p-t", "n2", "10.0.0.5", device="i-t"))
        elif change == "leaves":
            one.neutron.remove("r-1")
        else:
            one.neutron.put(replace(_A, addresses=()))
            one.neutron.put(neutron_port("p-t", "n2", "10.0.0.5", device="i-t"))
        await one.pass_time(16)
        assert not one.source.routes()


async def test_a_router_that_seems_to_join_nothing_is_asked_for_again(kept: Path) -> None:
    async with rig(kept, _A, settings=NeutronSourceSettings(negative_ttl_s=0)) as one:
        assert await one.look("r", "10.0.0.5", router=True) == _MISSING
        one.neutron.put(router_port("r-1", "n1", "r"))
        assert await one.look("r", "10.0.0.5", router=True) == _FOUND_A


# Lifetimes


_SHORT = NeutronSourceSettings(lifetime_s=100, refresh_s=5)


async def test_a_guest_that_does_not_ask_in_time_is_withdrawn_kept_up_to_date_and_forgotten(
    kept: Path,
) -> None:
    async with rig(kept, _A, _B, settings=_SHORT) as one:
        one.random[0] = 0.0
        for address in ("10.0.0.5", "10.0.0.6"):
            await one.look("n1", address)
        await one.pass_time(99)
        assert one.owners
        await one.pass_time(2)
        assert not one.owners
        one.neutron.remove("p-b")
        await one.pass_time(9)
        assert one.asked
        assert await one.look("n1", "10.0.0.5") == _FOUND_A
        assert one.asked == 0
        assert one.owners["n1/10.0.0.5"] == "i-a"
        assert await one.look("n1", "10.0.0.6") == _MISSING
        await one.pass_time(100)
        assert not one.owners
        assert len(one.source.known.ports) == 1
        await one.pass_time(_SHORT.aside_s)
        assert not one.source.known.ports


async def test_lifetimes_that_began_together_do_not_end_together(kept: Path) -> None:
    async with rig(kept, _A, _B, settings=_SHORT) as one:
        one.random[0] = 0.0
        await one.look("n1", "10.0.0.5")
        one.random[0] = 1.0
        await one.look("n1", "10.0.0.6")
        await one.pass_time(91)
        assert set(one.owners.values()) == {"i-a"}


# Neutron does not answer


@pytest.mark.parametrize(("failure", "result"), [(DOWN, "failed"), (LATE, "timeout")])
async def test_what_is_known_is_still_served_and_marked_stale(
    kept: Path, failure: Exception, result: str
) -> None:
    async with rig(kept, _A, settings=_SHORT) as one:
        await one.look("n1", "10.0.0.5")
        one.neutron.failure = failure  # type: ignore[assignment]
        await one.pass_time(2000, step=10)
        assert one.owners["n1/10.0.0.5"] == "i-a"
        assert await one.look("n1", "10.0.0.5") == _FOUND_A
        assert one.source.explain_freshness(NetworkId("n1"), ip_address("10.0.0.5")) == (
            "it is port p-a of neutron, confirmed 2000 s ago; stale since, because neutron does not answer"
        )
        assert one.source.queries.stale_s >= 1990
        assert set(one.source.queries.results) == {"ok", result}
        assert one.in_sync()
        (problem,) = one.heard.last.problems
        assert problem.field == "neutron"
        assert problem.reason == str(failure).splitlines()[0]
        one.neutron.failure = None
        await one.pass_time(40)
        assert one.source.queries.stale_s == 0
        assert not one.heard.last.problems


async def test_look_ups_of_the_unknown_fail_at_once_while_neutron_is_down(kept: Path) -> None:
    async with rig(kept, _A) as one:
        one.neutron.failure = DOWN
        assert await one.look("n1", "10.0.0.5") == LookUpUnavailable("connection refused")
        assert one.asked == 1
        for number in range(20):
            assert isinstance(await one.look("n1", f"10.0.0.{number}"), LookUpUnavailable)
        assert one.asked == 0
        assert one.source.queries.backoff_s > 0
        # It notices by itself that Neutron answers again.
        one.neutron.failure = None
        await one.pass_time(2)
        assert not one.heard.last.problems
        assert one.source.queries.backoff_s == 0
        assert await one.look("n1", "10.0.0.5") == _FOUND_A


async def test_a_neutron_that_is_down_from_the_start_is_reported(kept: Path) -> None:
    async with rig(kept, neutron=FakeNeutron(failure=DOWN)) as one:
        assert one.heard.observations[0].in_sync
        assert one.heard.last.problems


async def test_the_pauses_grow_to_half_a_minute_and_are_of_random_length(kept: Path) -> None:
    async with rig(kept) as one:
        one.neutron.failure = DOWN
        pauses = []
        await one.look("n1", "10.0.0.5")
        for _ in range(8):
            pauses.append(one.source.queries.backoff_s)
            await one.pass_time(pauses[-1])
        assert pauses == [2, 4, 8, 16, 30, 30, 30, 30]
        one.random[0] = 0.25
        await one.pass_time(30)
        assert one.source.queries.backoff_s == 7.5


async def test_when_a_pause_is_over_one_query_finds_out(kept: Path) -> None:
    async with rig(kept, _A) as one:
        one.neutron.failure = DOWN
        await one.look("n1", "10.0.0.5")
        one.neutron.failure = None
        one.neutron.open.clear()
        one.time.time += 2.5
        looks = [asyncio.create_task(one.look(f"n{number}", "10.0.0.5")) for number in range(1, 51)]
        await asyncio.sleep(0.01)
        assert one.neutron.at_once == 1
        one.neutron.open.set()
        answers = await asyncio.gather(*looks)
        assert sum(isinstance(each, LookUpUnavailable) for each in answers) == 49


async def test_failures_on_their_way_together_are_one(kept: Path) -> None:
    async with rig(kept) as one:
        one.neutron.failure = DOWN
        one.neutron.open.clear()
        looks = [asyncio.create_task(one.look(f"n{number}", "10.0.0.5")) for number in range(8)]
        await asyncio.sleep(0.01)
        one.neutron.open.set()
        await asyncio.gather(*looks)
        assert one.source.queries.backoff_s == 2
        assert one.source.queries.results == {"ok": 1, "failed": 8}


# Over a restart


async def test_what_is_known_is_kept_over_a_restart_without_neutron(kept: Path) -> None:
    neutron, time = FakeNeutron(), FakeTime()
    joined = router_port("r-1", "n1", "r")
    async with rig(kept, _A, _B, joined, neutron=neutron, time=time) as one:
        await one.look("r", "10.0.0.5", router=True)
        await one.look("n1", "10.0.0.6")
        before, routes = one.owners, one.source.routes()
        assert routes
    neutron.failure = DOWN
    time.time += 50
    async with rig(kept, neutron=neutron, time=time) as one:
        first = one.heard.observations[0]
        assert first.full
        assert first.in_sync
        assert first.implied_networks == {"n1"}
        assert one.owners == before
        assert one.source.routes() == routes
        assert await one.look("r", "10.0.0.5", router=True) == _FOUND_A
        assert isinstance(await one.look("n1", "10.0.0.7"), LookUpUnavailable)
        freshness = str(one.source.explain_freshness(NetworkId("n1"), ip_address("10.0.0.5")))
        assert re.search("confirmed 5[0-9] s ago; stale since", freshness)


async def test_what_is_kept_is_asked_for_again_at_once_and_what_went_is_not_kept(
    kept: Path,
) -> None:
    neutron = FakeNeutron()
    async with rig(kept, _A, _B, neutron=neutron) as one:
        await one.look("n1", "10.0.0.5")
        await one.look("n1", "10.0.0.6")
    neutron.remove("p-a")
    async with rig(kept, neutron=neutron) as one:
        assert set(one.heard.observations[0].instances) == {"i-a", "i-b"}
        assert one.owners == {"n1/10.0.0.6": "i-b"}
    neutron.failure = DOWN
    async with rig(kept, neutron=neutron) as one:
        assert set(one.heard.observations[0].instances) == {"i-b"}


async def test_a_killed_process_has_kept_what_it_knew_a_second_ago(kept: Path) -> None:
    async with rig(kept, _A) as one:
        await one.look("n1", "10.0.0.5")
        await one.pass_time(1)
        copy = kept.with_name("copy.sqlite")
        for suffix in ("", "-wal"):
            part = kept.with_name(kept.name + suffix)
            if part.exists():
                copy.with_name(copy.name + suffix).write_bytes(part.read_bytes())
    async with rig(copy, neutron=FakeNeutron(failure=DOWN)) as other:
        assert other.owners["n1/10.0.0.5"] == "i-a"


async def test_a_file_of_garbage_costs_what_was_kept_and_nothing_else(kept: Path) -> None:
    await asyncio.to_thread(kept.write_bytes, b"no database" * 500)
    async with rig(kept, _A) as one:
        assert await one.look("n1", "10.0.0.5") == _FOUND_A
        (problem,) = one.heard.last.problems
        assert problem.file == str(kept)
        await asyncio.to_thread(kept.unlink)
        await one.pass_time(1)
        assert not one.heard.last.problems


# The list


_LISTED = NeutronSourceSettings(list_every_s=60, page_size=10)


def _many(count: int, host: str | None = None) -> list[object]:
    return [
        neutron_port(f"p-{number:03}", "n1", f"10.0.1.{number}", device=f"i-{number:03}", host=host)
        for number in range(count)
    ]


@pytest.mark.parametrize("count", [0, 10, 25])
async def test_a_list_of_all_ports_is_read_page_by_page(kept: Path, count: int) -> None:
    async with rig(kept, *_many(count), settings=_LISTED) as one:
        (first,) = one.heard.observations
        assert first.full
        assert first.in_sync
        assert len(first.instances) == count


@pytest.mark.parametrize(("ignored", "found"), [({"limit", "after"}, 25), ({"after"}, 10)])
async def test_a_neutron_that_knows_no_pages_or_begins_each_anew_is_not_asked_for_ever(
    kept: Path, ignored: set[str], found: int
) -> None:
    neutron = FakeNeutron(ignored=frozenset(ignored))
    async with rig(kept, *_many(25), settings=_LISTED, neutron=neutron) as one:
        assert len(one.owners) == found
        assert one.source.queries.results["ok"] <= 3


async def test_the_list_is_read_again_and_only_changes_are_reported(kept: Path) -> None:
    async with rig(kept, *_many(25), settings=_LISTED) as one:
        one.neutron.remove("p-003")
        one.neutron.put(_A)
        await one.pass_time(50)
        assert one.asked == 0
        await one.pass_time(11)
        assert "n1/10.0.1.3" not in one.owners
        assert one.owners["n1/10.0.0.5"] == "i-a"
        assert [each.full for each in one.heard.observations].count(True) == 1
        reported = [set(each.instances) for each in one.heard.observations[1:]]
        assert set().union(*reported) == {"i-a"}


@pytest.mark.parametrize("shown", [0, 10])
async def test_a_list_that_is_not_whole_takes_nothing_away(kept: Path, shown: int) -> None:
    async with rig(kept, *_many(25), settings=_LISTED) as one:
        before = one.owners
        one.neutron.unlisted = frozenset([*one.neutron.ports_by_id][shown:])
        await one.pass_time(59)
        one.neutron.queries.clear()
        await one.pass_time(1)
        assert any(query.limit for query in one.neutron.queries)
        one.neutron.unlisted = frozenset()
        await one.pass_time(65)
        assert one.owners == before


async def test_a_refused_port_is_reported_until_it_is_not_on_the_list(kept: Path) -> None:
    async with rig(kept, *_many(3), replace(_A, device="a|b"), settings=_LISTED) as one:
        assert len(one.owners) == 3
        await one.pass_time(600, step=30)
        assert one.heard.last.problems
        one.neutron.remove("p-a")
        await one.pass_time(61)
        assert not one.heard.last.problems


async def test_a_port_that_left_the_list_is_asked_for_at_once_if_its_guest_had_asked(
    kept: Path,
) -> None:
    settings = _LISTED.model_copy(update={"list_host": "here", "refresh_s": 1000.0})
    gone, moved = _many(2, "here")
    async with rig(kept, gone, moved, settings=settings) as one:
        await one.look("n1", "10.0.1.0")
        await one.look("n1", "10.0.1.1")
        one.neutron.remove("p-000")
        one.neutron.put(neutron_port("p-001", "n1", "10.0.1.1", device="i-001", host="there"))
        await one.pass_time(62)
        assert one.owners == {"n1/10.0.1.1": "i-001"}


async def test_only_ports_of_one_host_are_listed_and_others_are_found_by_look_up(
    kept: Path,
) -> None:
    settings = _LISTED.model_copy(update={"list_host": "here"})
    mine = neutron_port("p-h", "n1", "10.0.0.7", device="i-h", host="here")
    far = replace(_A, host="there")
    for ignored in (frozenset[str](), frozenset({"host"})):
        neutron = FakeNeutron(ignored=ignored)
        path = kept.with_name(f"{len(ignored)}.sqlite")
        async with rig(path, mine, far, settings=settings, neutron=neutron) as one:
            assert one.owners == {"n1/10.0.0.7": "i-h"}
            assert await one.look("n1", "10.0.0.5") == _FOUND_A
            await one.pass_time(130)
            assert one.owners["n1/10.0.0.5"] == "i-a"


async def test_before_the_first_list_a_source_without_memory_is_not_in_sync(kept: Path) -> None:
    neutron, time = FakeNeutron(failure=DOWN), FakeTime()
    neutron.put(*_many(3))  # type: ignore[arg-type]
    async with rig(kept, settings=_LISTED, neutron=neutron, time=time) as one:
        assert not any(each.full or each.in_sync for each in one.heard.observations)
        neutron.failure = None
        await one.pass_time(40)
        assert one.in_sync()
        assert [each.full for each in one.heard.observations].count(True) == 1
        assert len(one.owners) == 3
    neutron.failure = DOWN
    async with rig(kept, settings=_LISTED, neutron=neutron, time=time) as one:
        assert one.heard.observations[0].in_sync
        assert len(one.owners) == 3


async def test_a_list_that_cannot_be_read_to_its_end_takes_nothing_away(kept: Path) -> None:
    async with rig(kept, *_many(25), settings=_LISTED) as one:
        one.neutron.failure = LATE
        await one.pass_time(70)
        assert len(one.owners) == 25
        assert one.heard.last.problems[0].field == "list"
        assert one.source.queries.backoff_s == 0  # one long query says nothing of short ones
        one.neutron.failure = None
        await one.pass_time(20)
        assert not one.heard.last.problems


# Life and death


class _WithoutLists(FakeNeutron):
    async def ports(self, query: PortQuery) -> tuple[NeutronPort, ...]:
        if query.limit is not None and query.limit > 1:
            raise LATE
        return await super().ports(query)


async def test_what_was_listed_stays_over_a_restart_while_no_list_can_be_read(kept: Path) -> None:
    settings = _LISTED.model_copy(update={"lifetime_s": _SHORT.lifetime_s})
    async with rig(kept, _A, settings=settings) as one:
        assert one.owners["n1/10.0.0.5"] == "i-a"
    async with rig(kept, _A, settings=settings, neutron=_WithoutLists()) as one:
        await one.pass_time(2 * settings.lifetime_s + settings.aside_s, step=5)
        assert one.owners["n1/10.0.0.5"] == "i-a"
        assert one.source.queries.outage is None


async def test_a_look_up_while_the_source_ends_or_after_that_is_answered(kept: Path) -> None:
    async with rig(kept, _A) as one:
        one.neutron.open.clear()
        looks = [
            asyncio.create_task(one.look(network, "10.0.0.5", router=router))
            for network, router in (("n1", False), ("r", True))
        ]
        await asyncio.sleep(0.01)
    answers = [*(await asyncio.gather(*looks)), await one.look("n1", "10.0.0.5")]
    assert {type(each) for each in answers} == {LookUpUnavailable}
    assert one.neutron.closed


async def test_a_port_without_a_network_is_named_by_its_id(kept: Path) -> None:
    second = neutron_port("p-0", "n2", "10.0.2.5", device="i-a")
    async with rig(kept, _A, second) as one:
        await one.look("n1", "10.0.0.5")
        await one.look("n2", "10.0.2.5")
        stranded = [
            StrandedPort("neutron", InstanceId("i-a"), number, NetworkId("n"))
            for number in range(3)
        ]
        fields = [one.source.explain_stranded(port).field for port in stranded]
        assert fields == ["ports.p-0", "ports.p-a", "instances.i-a.ports[2].network"]
        ports = one.heard.inventory.instances[InstanceId("i-a")].ports
        assert [port.network for port in ports] == ["n2", "n1"]
