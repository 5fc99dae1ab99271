import json
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import cast

import pytest

from imdsproxy.controller import watching as module
from imdsproxy.controller.watching import Watching
from imdsproxy.errors import RuntimeUnavailable
from imdsproxy.haproxy.master import MasterClient, WorkerEnded
from imdsproxy.haproxy.process import Haproxy
from imdsproxy.haproxy.rules.runtime import Processes
from support.tasks import background, until


def line(number: int, *, network: str = "blue", instance: str = "vm-1") -> str:
    found = {"time": 1.0, "number": number, "network": network, "address": "10.0.0.5"}
    found |= {"instance": instance, "method": "GET", "path": f"/{number}", "status": 200}
    return json.dumps({**found, "by": "guests/<CACHE>", "ms": 1})


@dataclass
class FakeMaster:
    rings: dict[int, list[str]] = field(default_factory=lambda: {1: []})
    ended: set[int] = field(default_factory=set)
    away: bool = False
    ask_workers = MasterClient.ask_workers

    async def read_processes(self) -> Processes:
        if self.away:
            raise RuntimeUnavailable("nobody there")
        workers = list(self.rings)
        return Processes(0, workers[0], tuple(workers[1:]))

    async def send(self, worker: int, command: str) -> str:
        assert command == "show events watched"
        if worker in self.ended:
            raise WorkerEnded(str(worker))
        return "\n".join(self.rings[worker])


class World:
    def __init__(self) -> None:
        self.master = FakeMaster()
        self.applied: list[bool] = []
        self.before_reload: list[object] = []
        haproxy = cast("Haproxy", self)  # all that is asked of it is its master
        self.watching = Watching(haproxy, self.apply, self.owner_of)

    async def apply(self) -> None:
        self.applied.append(self.watching.wanted)

    @staticmethod
    def owner_of(network: str, address: str) -> str | None:
        return "found" if (network, address) == ("blue", "10.0.0.5") else None

    async def paths(self, cursor: int | None, **chosen: str) -> tuple[int, list[str], bool]:
        report = await self.watching.read(cursor, **chosen)
        return report.cursor, [one.path for one in report.requests], report.missed


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World()
    async with background(made.watching.run()):
        yield made


async def test_every_watcher_sees_each_request_once_and_none_from_before(world: World) -> None:
    world.master.rings[1] = [line(1)]
    assert not world.watching.wanted
    cursor, paths, _ = await world.paths(None)
    assert (world.applied, paths) == ([True], [])
    world.master.rings[1] += [line(2), line(3)]
    for _ in range(2):
        after, paths, missed = await world.paths(cursor)
        assert (paths, missed) == (["/2", "/3"], False)
    assert await world.paths(after) == (after, [], False)
    world.master.away = True
    assert await world.paths(after) == (after, [], False)
    world.master.away = False
    world.master.rings[1].append(line(4))
    assert (await world.paths(after))[1] == ["/4"]
    assert world.applied == [True]


async def test_requests_of_all_workers_are_shown_also_of_one_that_comes(world: World) -> None:
    cursor, _, _ = await world.paths(None)
    world.master.rings = {2: [line(1), line(2)], 1: [line(7)]}
    cursor, paths, _ = await world.paths(cursor)
    assert sorted(paths) == ["/1", "/2", "/7"]
    world.master.ended = {1}
    world.master.rings[2].append(line(3))
    cursor, paths, _ = await world.paths(cursor)
    assert paths == ["/3"]


async def test_that_some_are_missing_is_reported_where_the_ring_or_the_memory_was_too_short(
    world: World,
) -> None:
    world.master.rings[1] = [line(1)]
    cursor, _, _ = await world.paths(None)
    world.master.rings[1] = [line(901), line(902)]
    after, paths, missed = await world.paths(cursor)
    assert (paths, missed) == (["/901", "/902"], True)
    assert await world.paths(after) == (after, [], False)
    world.watching._kept = deque(maxlen=2)
    world.master.rings[1] += [line(1), line(2), line(3)]
    assert (await world.paths(after))[1:] == (["/2", "/3"], True)


async def test_only_a_network_or_an_instance_can_be_watched(world: World) -> None:
    cursor, _, _ = await world.paths(None)
    world.master.rings[1] = [
        line(1),
        line(2, network="red"),
        line(3, instance="vm-2"),
        line(4, instance="-"),
    ]
    assert (await world.paths(cursor, network="red"))[1] == ["/2"]
    assert (await world.paths(cursor, instance="vm-2"))[1] == ["/3"]
    # HAProxy's maps had nobody: it is asked whose the address is now.
    assert (await world.paths(cursor, instance="found"))[1] == ["/4"]


async def test_haproxy_stops_reporting_when_there_is_no_watcher_any_more(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_IDLE_S", 0.05)
    await world.watching.read(None)
    await until(lambda: world.applied == [True, False])
    assert not world.watching.wanted
    await world.watching.read(None)
    assert world.applied[:3] == [True, False, True]
