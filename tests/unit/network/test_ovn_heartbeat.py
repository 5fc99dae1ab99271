"""What Neutron's server sees of this host's agent."""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Final, cast
from unittest.mock import Mock

from imdsproxy.errors import SourceUnavailable
from imdsproxy.network.ovn.host import OvnHeartbeat, OvnHost, agent_id, plan_registration
from imdsproxy.sources.ovn.ports import LocalChassis, SouthboundView
from imdsproxy.sources.ovn.source import OvnSource
from support.patience import patience

NUMBER: Final = "neutron:ovn-metadata-sb-cfg"
ID: Final = "neutron:ovn-metadata-id"


@dataclass
class Southbound:
    """A Southbound database with this host's row in Chassis_Private.

    Attributes:
        row: Its `external_ids`; none without the row.
        refuses: Each write fails.
        written: When each number was written.
        changed: Set after each change.
    """

    row: dict[str, str] | None = field(default_factory=dict)
    nb_cfg: int = 7
    refuses: bool = False
    written: list[tuple[str, float]] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    local: LocalChassis = field(default_factory=lambda: LocalChassis("c1", "h", "", "br-int", ""))

    @property
    def view(self) -> SouthboundView:
        private = None if self.row is None else dict(self.row)
        return SouthboundView("u", frozenset({"c1"}), private=private, nb_cfg=self.nb_cfg)

    async def change_southbound(self, change: Callable[[Mapping[str, Any], Any], None]) -> None:
        if self.refuses:
            raise SourceUnavailable("not allowed")
        assert self.row is not None

        def setkey(_column: str, key: str, value: str) -> None:
            assert self.row is not None
            self.row[key] = value
            if key == NUMBER:
                self.written.append((value, time.monotonic()))

        rows = {1: SimpleNamespace(setkey=setkey)}
        change({"Chassis_Private": SimpleNamespace(rows=rows)}, None)


async def follow(
    southbound: Southbound, random: float, steps: Callable[[OvnHeartbeat], Any]
) -> None:
    heartbeat = OvnHeartbeat(cast("OvnSource", southbound), lambda: random)
    task = asyncio.create_task(heartbeat.run())
    try:
        await steps(heartbeat)
    finally:
        task.cancel()


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(10 * patience()):
        while not holds():
            await asyncio.sleep(0.005)


async def test_the_first_number_is_written_at_once_and_later_ones_after_a_random_part_of_ten_seconds() -> (
    None
):
    southbound = Southbound()

    async def steps(heartbeat: OvnHeartbeat) -> None:
        await until(lambda: southbound.row and southbound.row.get(NUMBER) == "7")
        southbound.nb_cfg, begun = 8, time.monotonic()
        heartbeat.beats.wake()
        await until(lambda: southbound.row and southbound.row[NUMBER] == "8")
        assert southbound.written[-1][1] - begun >= 0.3
        assert len(southbound.written) == 2

    await follow(southbound, 0.03, steps)


async def test_a_row_made_anew_is_registered_at_once_while_a_number_waits_for_its_time() -> None:
    southbound = Southbound({NUMBER: "6", ID: "older"})

    async def steps(heartbeat: OvnHeartbeat) -> None:
        await until(lambda: southbound.row and southbound.row.get("neutron:ovn-bridge"))
        assert southbound.row == {NUMBER: "6", ID: "older", "neutron:ovn-bridge": "br-int"}
        southbound.row = {}
        heartbeat.beats.wake()
        await until(lambda: southbound.row and ID in southbound.row)
        assert southbound.row[ID] == agent_id("c1")

    await follow(southbound, 1.0, steps)


async def test_a_number_that_changes_shortly_after_another_change_is_written() -> None:
    southbound = Southbound()
    host = OvnHost(cast("OvnSource", southbound), Mock(ovn_needs=lambda: None), Mock())
    host.heartbeat.random = lambda: 0.0
    tasks = [asyncio.create_task(one) for one in host.work()]
    try:
        await until(lambda: southbound.row and southbound.row.get(NUMBER) == "7")
        southbound.changed.set()
        for _ in range(10):
            # Less than the time for which changes are collected.
            await asyncio.sleep(0)
        southbound.nb_cfg = 8
        southbound.changed.set()
        await until(lambda: southbound.row and southbound.row[NUMBER] == "8")
    finally:
        for task in tasks:
            task.cancel()


async def test_a_refused_heartbeat_is_a_problem_until_it_is_written() -> None:
    southbound = Southbound(refuses=True)

    async def steps(heartbeat: OvnHeartbeat) -> None:
        await until(lambda: heartbeat.problems)
        (problem,) = heartbeat.problems
        assert (problem.field, problem.reason) == ("ovn.heartbeat", "not allowed")
        assert problem.hint
        southbound.refuses = False
        await until(lambda: not heartbeat.problems)
        assert southbound.row is not None
        assert southbound.row[NUMBER] == "7"

    await follow(southbound, 0.0, steps)


def test_the_agents_id_is_that_of_neutrons_own_agent() -> None:
    # As uuid5(chassis, "metadata_agent") gives it, and for a name that is no UUID in Neutron's name space.
    chassis = "3f3c5b7a-0000-4000-8000-000000000001"
    assert agent_id(chassis) == "c8882852-b669-5d1b-bc41-863db87e89e5"
    assert agent_id("host-1") == "dddb9eaa-ad62-5189-a7e1-426ef2b15c19"


def test_an_agents_id_that_is_registered_stays() -> None:
    assert plan_registration("host-1", "br-int", {}) == {
        "neutron:ovn-metadata-id": agent_id("host-1"),
        "neutron:ovn-bridge": "br-int",
    }
    present = {"neutron:ovn-metadata-id": "older", "neutron:ovn-bridge": "br-int"}
    assert plan_registration("host-1", "br-int", present) == {}
