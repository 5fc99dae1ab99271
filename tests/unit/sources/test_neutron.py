"""The source `neutron` against a Neutron in memory, on a clock that stands still; and what it knows of ports."""

import asyncio
import re
import sqlite3
from contextlib import closing
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest

from imdsproxy.config.sources import NeutronSourceSettings
from imdsproxy.model.addresses import link_local_of
from imdsproxy.model.entities import InstanceId, MacAddress, NetworkId, Upstream
from imdsproxy.model.observation import StrandedPort
from imdsproxy.sources.api import LookUpUnavailable, PortAmbiguous, PortFound, PortMissing
from imdsproxy.sources.neutron.cache import open_cache
from imdsproxy.sources.neutron.known import KnownPorts
from imdsproxy.sources.neutron.ports import NeutronPort, PortQuery, parse_ports, render_query
from support.fake_neutron import (
    DOWN,
    LATE,
    FakeNeutron,
    FakeTime,
    neutron_port,
    neutron_rig,
    router_port,
)

_MAC = "fa:16:3e:00:00:05"
_A = neutron_port("p-a", "n1", "10.0.0.5", "fd00::5", device="i-a", mac=_MAC)
_B = neutron_port("p-b", "n1", "10.0.0.6", device="i-b")
_TWIN = neutron_port("p-t", "n2", "10.0.0.5", device="i-t")
_JOINED = router_port("r-1", "n1", "r")
_FOUND_A = PortFound(NetworkId("n1"), InstanceId("i-a"))
_MISSING = PortMissing()
_SHORT = NeutronSourceSettings(lifetime_s=100, refresh_s=5)
_LISTED = NeutronSourceSettings(list_every_s=60, page_size=10)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "neutron.sqlite"


async def test_a_source_that_knows_nothing_finds_out_once_whether_neutron_answers() -> None:
    async with neutron_rig() as one:
        assert one.source.queries.results == {"ok": 1}
        await one.pass_time(30)
        assert one.asked == 0


async def test_before_it_is_to_begin_neutron_is_asked_for_guests_alone() -> None:
    begin = asyncio.Event()
    async with neutron_rig(_A, begin=begin) as one:
        await one.heard.until(lambda heard: heard.last.in_sync)
        assert await one.look("n1", "10.0.0.5") == _FOUND_A
        assert one.asked == 1
        begin.set()
        await one.pass_time(10)
        assert one.asked == 1


async def test_a_list_without_which_nothing_is_known_is_read_at_once() -> None:
    async with neutron_rig(_A, settings=_LISTED, begin=asyncio.Event()) as one:
        await one.heard.until(lambda heard: heard.last.in_sync)
        assert one.owners["n1/10.0.0.5"] == "i-a"


@pytest.mark.parametrize(
    "address", ["10.0.0.5", "::ffff:10.0.0.5", "fd00:0:0::5", "fe80::f816:3eff:fe00:5"]
)
async def test_an_address_is_found_and_in_force_before_it_is_answered(address: str) -> None:
    async with neutron_rig(_A, _B) as one:
        assert await one.look("n1", address) == _FOUND_A
        (found,) = one.heard.inventory.instances.values()
        assert (found.id, found.project, found.upstream) == ("i-a", "blue", Upstream.NOVA)
        addresses = ("10.0.0.5", "fd00::5", link_local_of(MacAddress(_MAC)))
        assert one.owners == {f"n1/{each}": "i-a" for each in addresses}
        assert one.heard.last.implied_networks == {"n1"}
        assert [query.networks for query in one.neutron.queries] == [("n1",)]
        assert one.asked == 1
        for each in addresses:
            assert await one.look("n1", str(each)) == _FOUND_A
        # Of no MAC.
        assert await one.look("n1", "fe80::1234") == _MISSING
        assert one.asked == 0


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({"device": ""}, []),
        ({"owner": "network:distributed", "device": "ovnmeta-n1"}, []),
        ({"device": "a|b"}, ["ports.p-a.device_id"]),
        ({"device": "x" * 65}, ["ports.p-a.device_id"]),
        ({"project": ""}, ["ports.p-a.project_id"]),
    ],
)
async def test_a_port_that_names_no_instance_of_nova_gets_nothing_and_what_is_no_id_is_reported(
    change: dict[str, str], refused: list[str]
) -> None:
    async with neutron_rig(replace(_A, **change)) as one:  # type: ignore[arg-type]
        assert await one.look("n1", "10.0.0.5") == _MISSING
        assert not one.owners
        assert [problem.field for problem in one.heard.last.problems] == refused
        # What is refused is reported for a while: nothing looks at it again by itself.
        await one.pass_time(301, step=60)
        assert not one.heard.last.problems
        one.neutron.put(_A)
        assert await one.look("n1", "10.0.0.5") == _FOUND_A


# Routers


@pytest.mark.parametrize("ignored", [set(), {"owners"}, {"owners", "devices"}])
async def test_behind_a_router_all_its_networks_are_looked_at(ignored: set[str]) -> None:
    owners = ["interface", "ha_router_replicated_interface", "interface_distributed", "gateway"]
    names = [f"network:router_{owner}".replace("router_ha_", "ha_") for owner in owners]
    ports = [router_port(f"r-{n}", f"n{n}", "r", name) for n, name in enumerate(names)]
    ports += [neutron_port(f"p-{n}", f"n{n}", f"10.0.{n}.5", device=f"i-{n}") for n in range(4)]
    found = [PortFound(NetworkId(f"n{n}"), InstanceId(f"i-{n}")) for n in range(3)]
    async with neutron_rig(*ports, neutron=FakeNeutron(ignored=frozenset(ignored))) as one:
        assert await one.look("other", "10.0.0.5", router=True) == _MISSING
        looks = [await one.look("r", f"10.0.{n}.5", router=True) for n in range(4)]
        # A router's gateway network is none of its networks.
        assert looks == [*found, _MISSING]
        assert one.asked == 6
        assert one.owners["n1/10.0.1.5"] == "i-1"
        assert one.source.routes()[NetworkId("r"), ip_address("10.0.1.5")] == found[1]
        assert await one.look("r", "10.0.1.5", router=True) == found[1]
        assert one.asked == 0


async def test_an_address_in_two_of_a_routers_networks_is_refused() -> None:
    async with neutron_rig(_JOINED, router_port("r-2", "n2", "r"), _A, _TWIN) as one:
        for _ in range(2):
            assert await one.look("r", "10.0.0.5", router=True) == PortAmbiguous(2)
        assert one.asked == 2
        assert not one.owners


async def test_a_router_of_many_networks_is_asked_in_parts() -> None:
    joined = [router_port(f"r-{number}", f"n{number:02}", "r") for number in range(40)]
    async with neutron_rig(*joined, replace(_A, network=NetworkId("n39"))) as one:
        found = await one.look("r", "10.0.0.5", router=True)
        assert found == PortFound(NetworkId("n39"), InstanceId("i-a"))
        assert max(len(query.networks) for query in one.neutron.queries) <= 32


# Many at once, and negative answers


async def test_a_hundred_misses_of_one_address_are_one_query() -> None:
    async with neutron_rig(_A) as one:
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


async def test_all_behind_a_router_wait_for_one_question_about_its_networks() -> None:
    async with neutron_rig(_A) as one:
        looks = [one.look("r", f"10.0.0.{number}", router=True) for number in range(40)]
        assert await asyncio.gather(*looks) == [_MISSING] * 40
        assert one.asked == 1


async def test_guests_behind_a_router_do_not_wait_for_all_that_is_asked_again() -> None:
    guests = [neutron_port(f"p-{each:03}", "n1", f"10.0.1.{each}") for each in range(200)]
    settings = NeutronSourceSettings(max_queries=2)
    async with neutron_rig(_JOINED, *guests, settings=settings) as one:
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
async def test_a_negative_answer_is_believed_for_seconds(ttl: float, believed: int) -> None:
    async with neutron_rig(settings=NeutronSourceSettings(negative_ttl_s=ttl)) as one:
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


async def test_a_network_that_invents_addresses_leaves_room_for_the_others() -> None:
    others = [neutron_port(f"p-{n}", f"n{n}", "10.0.0.5", device=f"i-{n}") for n in range(2, 9)]
    async with neutron_rig(*others, settings=NeutronSourceSettings(max_queries=4)) as one:
        one.neutron.open.clear()
        invented = [
            asyncio.create_task(one.look("n1", f"10.{number >> 8}.{number & 255}.9"))
            for number in range(1000)
        ]
        await asyncio.sleep(0.05)
        honest = [asyncio.create_task(one.look(each.network, "10.0.0.5")) for each in others]
        await asyncio.sleep(0.01)
        # No more at once than the settings allow.
        asked = [str(query.networks[0]) for query in one.neutron.queries]
        assert asked == ["n1", "n1", "n2", "n3"]
        one.neutron.open.set()
        assert {type(each) for each in await asyncio.gather(*honest)} == {PortFound}
        answers = await asyncio.gather(*invented)
        assert {type(each) for each in answers} == {PortMissing, LookUpUnavailable}
        assert one.source.queries.stale_s == 0
        # What stands for a network or router goes with its last question.
        await one.look("r", "10.0.0.5", router=True)
        queries = one.source.queries
        assert not [*queries._shares, *queries._waiting, *queries._asking]


# Kept up to date


async def test_ports_in_use_are_asked_for_again_many_with_one_query() -> None:
    guests = [neutron_port(f"p-{n:03}", "n1", f"10.0.1.{n}", device=f"i-{n}") for n in range(62)]
    async with neutron_rig(_JOINED, *guests) as one:
        for number in range(62):
            await one.look("n1", f"10.0.1.{number}")
        reported = len(one.heard.observations)
        assert one.asked == 62
        await one.pass_time(10)
        assert one.asked == 2
        assert len(one.heard.observations) == reported
        for number in range(62):
            await one.look("r", f"10.0.1.{number}", router=True)
        assert one.asked == 63
        await one.pass_time(10)
        assert one.asked <= 10
        assert len(one.source.routes()) == 62


async def test_a_neutron_that_shows_nothing_for_a_moment_takes_nothing_away() -> None:
    """One that starts does: while a thread reads the policy's rules, others leave every port out."""
    async with neutron_rig(_A, _B, _JOINED) as one:
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


async def test_what_a_neutron_leaves_out_before_and_after_an_outage_is_still_there() -> None:
    """One that starts again and again shows nothing each time, and never what there is."""
    async with neutron_rig(_A, _B, _JOINED) as one:
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


async def test_a_negative_answer_is_not_believed_of_a_neutron_that_has_just_come_back() -> None:
    async with neutron_rig(_A) as one:
        one.neutron.failure = DOWN
        await one.look("n1", "10.0.0.5")
        one.neutron.failure = None
        one.neutron.remove("p-a")
        await one.pass_time(3)
        assert isinstance(await one.look("n1", "10.0.0.5"), LookUpUnavailable)
        # One that it shows may be the one without an instance, beside the guest's.
        one.neutron.put(neutron_port("p-x", "n1", "10.0.0.5", device=""))
        assert isinstance(await one.look("n1", "10.0.0.5"), LookUpUnavailable)
        await one.pass_time(3)
        assert await one.look("n1", "10.0.0.5") == _MISSING


async def test_a_port_is_gone_only_if_neutron_says_so_while_it_shows_another() -> None:
    async with neutron_rig(_A, _B) as one:
        await one.look("n1", "10.0.0.5")
        await one.look("n1", "10.0.0.6")
        one.neutron.remove("p-a")
        one.neutron.queries.clear()
        await one.pass_time(9)
        assert one.owners == {"n1/10.0.0.6": "i-b"}
        assert [query.ids for query in one.neutron.queries] == [("p-a", "p-b"), ("p-a", "p-b")]


@pytest.mark.parametrize(
    "change", [[_TWIN], [replace(_A, addresses=()), _TWIN], [replace(_JOINED, device="another")]]
)
async def test_what_is_behind_a_router_is_looked_at_again(change: list[NeutronPort]) -> None:
    async with neutron_rig(_JOINED, router_port("r-2", "n2", "r"), _A) as one:
        await one.look("r", "10.0.0.5", router=True)
        await one.pass_time(20)
        assert one.source.routes()
        one.neutron.put(*change)
        await one.pass_time(16)
        assert not one.source.routes()


async def test_a_router_that_seems_to_join_nothing_is_asked_for_again() -> None:
    async with neutron_rig(_A, settings=NeutronSourceSettings(negative_ttl_s=0)) as one:
        assert await one.look("r", "10.0.0.5", router=True) == _MISSING
        one.neutron.put(_JOINED)
        assert await one.look("r", "10.0.0.5", router=True) == _FOUND_A


async def test_a_guest_that_does_not_ask_in_time_is_withdrawn_kept_up_to_date_and_forgotten() -> (
    None
):
    async with neutron_rig(_A, _B, settings=_SHORT) as one:
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


async def test_lifetimes_that_began_together_do_not_end_together() -> None:
    async with neutron_rig(_A, _B, settings=_SHORT) as one:
        one.random[0] = 0.0
        await one.look("n1", "10.0.0.5")
        one.random[0] = 1.0
        await one.look("n1", "10.0.0.6")
        await one.pass_time(91)
        assert set(one.owners.values()) == {"i-a"}


# Neutron does not answer


@pytest.mark.parametrize(("failure", "result"), [(DOWN, "failed"), (LATE, "timeout")])
async def test_what_is_known_is_still_served_and_marked_stale(
    failure: Exception, result: str
) -> None:
    async with neutron_rig(_A, settings=_SHORT) as one:
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
        assert one.heard.last.in_sync
        (problem,) = one.heard.last.problems
        assert (problem.field, problem.reason) == ("neutron", str(failure).splitlines()[0])
        one.neutron.failure = None
        await one.pass_time(40)
        assert one.source.queries.stale_s == 0
        assert not one.heard.last.problems


async def test_look_ups_of_the_unknown_fail_at_once_while_neutron_is_down() -> None:
    async with neutron_rig(_A, neutron=FakeNeutron(failure=DOWN)) as one:
        assert one.heard.observations[0].in_sync
        assert one.heard.last.problems
        for number in range(20):
            found = await one.look("n1", f"10.0.0.{number}")
            assert found == LookUpUnavailable("connection refused")
        assert one.asked == 0
        # It notices by itself that Neutron answers again.
        one.neutron.failure = None
        await one.pass_time(2)
        assert not one.heard.last.problems
        assert one.source.queries.backoff_s == 0
        assert await one.look("n1", "10.0.0.5") == _FOUND_A


async def test_failures_at_once_are_one_and_pauses_grow_to_half_a_minute_at_random() -> None:
    async with neutron_rig() as one:
        one.neutron.failure = DOWN
        one.neutron.open.clear()
        looks = [asyncio.create_task(one.look(f"n{number}", "10.0.0.5")) for number in range(8)]
        await asyncio.sleep(0.01)
        one.neutron.open.set()
        await asyncio.gather(*looks)
        assert one.source.queries.results == {"ok": 1, "failed": 8}
        pauses = []
        for _ in range(8):
            pauses.append(one.source.queries.backoff_s)
            await one.pass_time(pauses[-1])
        assert pauses == [2, 4, 8, 16, 30, 30, 30, 30]
        one.random[0] = 0.25
        await one.pass_time(30)
        assert one.source.queries.backoff_s == 7.5
        one.neutron.failure = None
        await one.pass_time(30)
        one.neutron.failure = DOWN
        await one.look("n1", "10.0.0.9")
        assert one.source.queries.backoff_s == 0.5


async def test_when_a_pause_is_over_one_query_finds_out() -> None:
    async with neutron_rig(_A) as one:
        one.neutron.failure = DOWN
        await one.look("n1", "10.0.0.5")
        one.neutron.failure = None
        one.neutron.open.clear()
        one.neutron.queries.clear()
        one.time.time += 2.5
        looks = [asyncio.create_task(one.look(f"n{number}", "10.0.0.5")) for number in range(1, 51)]
        await asyncio.sleep(0.01)
        assert one.asked == 1
        one.neutron.open.set()
        answers = await asyncio.gather(*looks)
        assert sum(isinstance(each, LookUpUnavailable) for each in answers) == 49


# Over a restart


async def test_what_is_known_is_kept_over_a_restart_without_neutron(kept: Path) -> None:
    # How old it is then, only the wall clock says.
    neutron, time = FakeNeutron(), FakeTime()
    time.pace = 1
    async with neutron_rig(_A, _B, _JOINED, kept=kept, neutron=neutron, time=time) as one:
        await one.look("r", "10.0.0.5", router=True)
        await one.look("n1", "10.0.0.6")
        before, routes = one.owners, one.source.routes()
        assert routes
        await one.pass_time(1)
        # A process that is killed has kept it too.
        assert {key for key, _ in open_cache(kept).load()} >= {"p-a", "p-b", *routes}
    neutron.failure = DOWN
    time.time += 50
    async with neutron_rig(kept=kept, neutron=neutron, time=time) as one:
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
    async with neutron_rig(_A, _B, kept=kept, neutron=neutron) as one:
        await one.look("n1", "10.0.0.5")
        await one.look("n1", "10.0.0.6")
    neutron.remove("p-a")
    async with neutron_rig(kept=kept, neutron=neutron) as one:
        assert set(one.heard.observations[0].instances) == {"i-a", "i-b"}
        assert one.owners == {"n1/10.0.0.6": "i-b"}
    neutron.failure = DOWN
    async with neutron_rig(kept=kept, neutron=neutron) as one:
        assert set(one.heard.observations[0].instances) == {"i-b"}


async def test_a_file_of_garbage_costs_what_was_kept_and_nothing_else(kept: Path) -> None:
    await asyncio.to_thread(kept.write_bytes, b"no database" * 500)
    async with neutron_rig(_A, kept=kept) as one:
        assert await one.look("n1", "10.0.0.5") == _FOUND_A
        (problem,) = one.heard.last.problems
        assert problem.file == str(kept)
        await asyncio.to_thread(kept.unlink)
        await one.pass_time(1)
        assert not one.heard.last.problems


# The list


def _many(count: int, host: str | None = None) -> list[NeutronPort]:
    return [
        neutron_port(f"p-{number:03}", "n1", f"10.0.1.{number}", device=f"i-{number:03}", host=host)
        for number in range(count)
    ]


@pytest.mark.parametrize(("ignored", "found"), [({"limit", "after"}, 25), ({"after"}, 10)])
async def test_a_neutron_that_knows_no_pages_or_begins_each_anew_is_not_asked_for_ever(
    ignored: set[str], found: int
) -> None:
    neutron = FakeNeutron(ignored=frozenset(ignored))
    async with neutron_rig(*_many(25), settings=_LISTED, neutron=neutron) as one:
        assert len(one.owners) == found
        assert one.source.queries.results["ok"] <= 3


@pytest.mark.parametrize("shown", [0, 10])
async def test_a_list_that_is_not_whole_takes_nothing_away(shown: int) -> None:
    async with neutron_rig(*_many(25), settings=_LISTED) as one:
        before = one.owners
        one.neutron.unlisted = frozenset([*one.neutron.ports_by_id][shown:])
        await one.pass_time(59)
        one.neutron.queries.clear()
        await one.pass_time(1)
        assert any(query.limit for query in one.neutron.queries)
        one.neutron.unlisted = frozenset()
        await one.pass_time(65)
        assert one.owners == before


async def test_a_refused_port_is_reported_until_it_is_not_on_the_list() -> None:
    async with neutron_rig(*_many(3), replace(_A, device="a|b"), settings=_LISTED) as one:
        assert len(one.owners) == 3
        await one.pass_time(600, step=30)
        assert one.heard.last.problems
        one.neutron.remove("p-a")
        await one.pass_time(61)
        assert not one.heard.last.problems


async def test_a_port_that_left_the_list_is_asked_for_at_once_if_its_guest_had_asked() -> None:
    settings = _LISTED.model_copy(update={"list_host": "here", "refresh_s": 1000.0})
    gone, moved = _many(2, "here")
    async with neutron_rig(gone, moved, settings=settings) as one:
        await one.look("n1", "10.0.1.0")
        await one.look("n1", "10.0.1.1")
        one.neutron.remove(gone.id)
        one.neutron.put(replace(moved, host="there"))
        await one.pass_time(62)
        assert one.owners == {"n1/10.0.1.1": "i-001"}


@pytest.mark.parametrize("ignored", [set(), {"host"}])
async def test_only_ports_of_one_host_are_listed_and_others_are_found_by_look_up(
    ignored: set[str],
) -> None:
    settings = _LISTED.model_copy(update={"list_host": "here"})
    ports = replace(_B, host="here"), replace(_A, host="there")
    neutron = FakeNeutron(ignored=frozenset(ignored))
    async with neutron_rig(*ports, settings=settings, neutron=neutron) as one:
        assert one.owners == {"n1/10.0.0.6": "i-b"}
        assert await one.look("n1", "10.0.0.5") == _FOUND_A
        await one.pass_time(130)
        assert one.owners["n1/10.0.0.5"] == "i-a"


async def test_before_the_first_list_a_source_without_memory_is_not_in_sync(kept: Path) -> None:
    neutron = FakeNeutron(failure=DOWN)
    async with neutron_rig(*_many(3), kept=kept, settings=_LISTED, neutron=neutron) as one:
        assert not any(each.full or each.in_sync for each in one.heard.observations)
        neutron.failure = None
        await one.pass_time(40)
        assert one.heard.last.in_sync
        assert [each.full for each in one.heard.observations].count(True) == 1
        assert len(one.owners) == 3
    neutron.failure = DOWN
    async with neutron_rig(kept=kept, settings=_LISTED, neutron=neutron) as one:
        assert one.heard.observations[0].in_sync
        assert len(one.owners) == 3


async def test_a_list_that_cannot_be_read_to_its_end_takes_nothing_away() -> None:
    async with neutron_rig(*_many(25), settings=_LISTED) as one:
        one.neutron.failure = LATE
        await one.pass_time(70)
        assert len(one.owners) == 25
        assert one.heard.last.problems[0].field == "list"
        assert one.source.queries.backoff_s == 0  # one long query says nothing of short ones
        one.neutron.failure = None
        await one.pass_time(20)
        assert not one.heard.last.problems


class _WithoutLists(FakeNeutron):
    async def ports(self, query: PortQuery) -> tuple[NeutronPort, ...]:
        if query.limit is not None and query.limit > 1:
            raise LATE
        return await super().ports(query)


async def test_what_was_listed_stays_over_a_restart_while_no_list_can_be_read(kept: Path) -> None:
    settings = _LISTED.model_copy(update={"lifetime_s": _SHORT.lifetime_s})
    async with neutron_rig(_A, kept=kept, settings=settings) as one:
        assert one.owners["n1/10.0.0.5"] == "i-a"
    async with neutron_rig(_A, kept=kept, settings=settings, neutron=_WithoutLists()) as one:
        await one.pass_time(2 * settings.lifetime_s + settings.aside_s, step=5)
        assert one.owners["n1/10.0.0.5"] == "i-a"
        assert one.source.queries.outage is None


async def test_a_look_up_while_the_source_ends_or_after_that_is_answered() -> None:
    async with neutron_rig(_A) as one:
        one.neutron.open.clear()
        looks = [
            asyncio.create_task(one.look(network, "10.0.0.5", router=router))
            for network, router in (("n1", False), ("r", True))
        ]
        await asyncio.sleep(0.01)
    answers = [*(await asyncio.gather(*looks)), await one.look("n1", "10.0.0.5")]
    assert {type(each) for each in answers} == {LookUpUnavailable}
    assert one.neutron.closed


async def test_a_port_without_a_network_is_named_by_its_id() -> None:
    async with neutron_rig(_A, neutron_port("p-0", "n2", "10.0.2.5", device="i-a")) as one:
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


_PLAIN = neutron_port("p-a", "n1", "10.0.0.5", device="i-a", mac=_MAC)


def owner(known: KnownPorts, address: str) -> str | None:
    found = known.at(NetworkId("n1"), ip_address(address))
    return None if found is None else found.port.id


def test_an_answer_that_is_late_does_not_undo_a_newer_one() -> None:
    known = KnownPorts()
    known.put(replace(_PLAIN, addresses=(ip_address("10.0.0.7"),)), asked=20)
    known.put(_PLAIN, asked=10)
    known.lose("p-a", asked=15)
    known.lose("p-a", asked=15, steady=0)
    known.lose("p-a", asked=16, steady=0)
    assert owner(known, "10.0.0.7") == "p-a"
    assert owner(known, "10.0.0.5") is None
    known.lose("p-a", asked=21)
    assert not known.ports


@pytest.mark.parametrize("taken", ["10.0.0.5", str(link_local_of(MacAddress(_MAC)))])
@pytest.mark.parametrize("first", ["older", "newer"])
def test_an_address_is_of_the_port_that_was_asked_for_last_whichever_answer_came_first(
    first: str, taken: str
) -> None:
    known = KnownPorts()
    newer = replace(_B, addresses=(ip_address("10.0.0.5"), ip_address("10.0.0.6")), mac=_PLAIN.mac)
    answers: list[tuple[NeutronPort, float]] = [(_PLAIN, 10), (newer, 20)]
    for port, asked in answers if first == "older" else reversed(answers):
        known.put(port, asked)
    assert owner(known, taken) == "p-b"
    assert owner(known, "10.0.0.6") == "p-b"
    mine = known.ports.get("p-a")
    assert mine is not None
    assert (mine.port.addresses, mine.port.mac) == ((), None)


@pytest.mark.parametrize("stolen", ["p-0", "p-z"])
def test_each_port_keeps_its_own_project_whatever_instance_it_names(stolen: str) -> None:
    """Any tenant can write any instance's id on a port: Nova is asked with the port's project (OSSA-2013-033)."""
    known = KnownPorts()

    def projects() -> dict[str, str | None]:
        instance = known.changes().instances[InstanceId("i-a")]
        return {port.network: port.project or instance.project for port in instance.ports}

    known.put(_PLAIN, asked=10)
    known.put(neutron_port(stolen, "n9", "10.9.0.1", device="i-a", project="red"), asked=10)
    assert projects() == {"n1": "blue", "n9": "red"}
    known.put(replace(_PLAIN, project="green"), asked=20)
    assert projects() == {"n1": "green", "n9": "red"}


def test_at_most_a_hundred_refused_ports_are_reported_with_what_a_tenant_wrote_escaped_and_cut() -> (
    None
):
    known = KnownPorts()
    for number in range(150):
        known.put(neutron_port(f"p-{number}", "n1", device="\x1b[31m" + "x" * 1000), asked=1)
    assert len(known.problems) == 100
    assert not any("\x1b" in each.reason or len(each.reason) >= 200 for each in known.problems)


@pytest.mark.parametrize(
    ("times", "made"), [([None], None), ([7, 5], 5), ([None, 7], 7), ([8, None, 7], 7)]
)
def test_an_instance_was_made_when_its_oldest_port_was_whatever_ports_come_and_go_later(
    times: list[int | None], made: int | None
) -> None:
    known = KnownPorts()

    def created() -> int | None:
        known.changes()
        return known.published[InstanceId("i-a")].created_at

    for index, when in enumerate(times):
        port = replace(_PLAIN, id=f"p-{index}", addresses=(), mac=None, created_at=when)
        known.put(port, asked=10)
    assert created() == made
    known.put(replace(_B, device="i-a", created_at=900), asked=20)
    for index in range(len(times)):
        known.lose(f"p-{index}", asked=30)
    assert created() == (made or 900)


@pytest.mark.parametrize(
    ("reported", "wanted"),
    [("2026-11-26T12:00:00Z", 1_795_694_400), ("yesterday", None), (None, None), ([], None)],
)
def test_when_a_port_was_made_is_asked_for_and_taken_where_it_is_a_time(
    reported: object, wanted: int | None
) -> None:
    assert "fields=created_at" in render_query(PortQuery())
    (port,) = parse_ports({"ports": [{"id": "p", "created_at": reported}]})
    assert port.created_at == wanted


def test_what_a_cache_could_not_write_it_writes_the_next_time(tmp_path: Path) -> None:
    path = tmp_path / "there" / "cache.sqlite"
    (tmp_path / "there").write_text("no directory")
    first, second = (neutron_port(f"p-{n}", "n1", f"10.0.0.{n}", created_at=n) for n in (1, 2))
    cache = open_cache(path)
    cache.keep({first.id: first, second.id: first})
    cache.save()
    problem = cache.problem
    assert problem is not None
    assert problem.file == str(path)
    (tmp_path / "there").unlink()
    cache.keep({second.id: second})
    cache.save()
    assert cache.problem is None
    with closing(sqlite3.connect(path)) as kept, kept:
        # As another program may: these are passed over.
        for number, text in enumerate(("{", "[]", "{}", "[" * 100_000)):
            kept.execute("INSERT INTO ports VALUES (?, ?)", (str(number), text))
        kept.execute("INSERT INTO routes VALUES ('r', 'n1', 'no address', 'p-1')")
    assert set(open_cache(path).load()) == {(first.id, first), (second.id, second)}
