"""Counts of reads without tokens, over workers and over controllers."""

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from imdsproxy.controller.token_counting import TokenCounting
from imdsproxy.controller.token_report import InstanceTokens
from imdsproxy.haproxy.master import MasterClient
from imdsproxy.haproxy.process import Haproxy
from imdsproxy.haproxy.rules.runtime import Processes
from imdsproxy.host.turns import AT_ONCE
from imdsproxy.model.entities import Instance, InstanceId
from imdsproxy.model.inventory import Inventory
from imdsproxy.model.policy import PolicyBook
from support.hand_clock import HandClock
from support.tasks import background, until


@dataclass
class _Workers:
    """HAProxy's workers, by pid: reads and refused reads of one guest; one that hangs has none."""

    counts: dict[int, tuple[int, int] | None] = field(default_factory=dict)
    ask_workers = MasterClient.ask_workers

    async def read_processes(self) -> Processes:
        first, *others = self.counts
        return Processes(0, first, tuple(others))

    async def send(self, worker: int, command: str) -> str:
        if (counts := self.counts[worker]) is None:
            await asyncio.Event().wait()
            raise AssertionError
        key = "blue|vm-1|latest|curl" if "readers" in command else "blue|vm-1"
        reads, refused = counts
        return f"0x55d8: key={key} use=0 exp=604740000 shard=0 gpc0={reads} gpc1=0 gpc2={refused}"


@dataclass
class _Host:
    """Where controllers come and go while workers live on."""

    path: Path
    workers: _Workers = field(default_factory=_Workers)
    clock: HandClock = field(default_factory=lambda: HandClock(pace=1))
    before_reload: list[object] = field(default_factory=list)
    one_in: int = 1

    def controller(self) -> TokenCounting:
        haproxy = SimpleNamespace(master=self.workers, before_reload=self.before_reload)
        one_in = self.one_in
        return TokenCounting(cast("Haproxy", haproxy), self.clock, lambda: one_in, self.path)


@pytest.fixture
def host(tmp_path: Path) -> _Host:
    return _Host(tmp_path / "token-counts.sqlite")


def _sums(counting: TokenCounting) -> tuple[int, int]:
    ledger = counting.ledger
    return ledger.read["blue"], ledger.refused["blue"]


async def test_what_a_worker_has_counted_is_kept_over_a_reload_where_another_one_hangs(
    host: _Host,
) -> None:
    host.workers.counts = {1: (5, 2), 2: None}
    counting = host.controller()
    assert host.before_reload == [counting.refresh]
    looking = asyncio.create_task(counting.refresh())
    await until(lambda: _sums(counting) == (5, 2))
    looking.cancel()


async def test_counts_outlive_the_controller_and_none_is_counted_twice(host: _Host) -> None:
    host.workers.counts = {1: (5, 2)}
    first = host.controller()
    await first.refresh()
    await first.save()
    # The worker goes on counting while there is no controller.
    host.workers.counts = {1: (8, 2)}
    host.clock.time += 3600
    second = host.controller()
    assert not second.recalled
    await second.refresh()
    assert _sums(second) == (8, 2)
    (guest,) = second.ledger.report([]).guests
    assert (guest.instance, guest.reads, guest.readers[0].client) == ("vm-1", 8, "curl")
    assert second.ledger.since == first.ledger.since
    await second.save()
    # HAProxy is another one, which begins at 0.
    host.workers.counts = {7: (4, 1)}
    third = host.controller()
    await third.refresh()
    assert _sums(third) == (12, 3)


async def test_a_controller_that_is_killed_loses_nothing_while_the_worker_lives(
    host: _Host,
) -> None:
    host.workers.counts = {1: (5, 2)}
    first = host.controller()
    await first.refresh()
    host.workers.counts = {1: (6, 2)}
    killed = host.controller()
    await killed.refresh()
    assert _sums(killed) == (6, 2)


async def test_counts_are_on_disk_a_minute_later(host: _Host) -> None:
    host.workers.counts = {1: (5, 2)}
    first = host.controller()
    await first.refresh()
    assert not host.path.exists()
    host.clock.time += 60
    await first.refresh()
    # Both are killed.
    host.workers.counts = {7: (1, 0)}
    second = host.controller()
    await second.refresh()
    assert _sums(second) == (6, 2)


async def test_a_broken_file_is_a_problem_and_counting_goes_on(host: _Host) -> None:
    host.path.write_bytes(b"SQLite format 3\0" + b"\xa5" * 20_000)
    host.workers.counts = {1: (5, 2)}
    counting = host.controller()
    await counting.refresh()
    assert _sums(counting) == (5, 2)
    assert "not kept over a restart" in str(counting.problems())
    assert "if the file is deleted" in str(counting.problems())
    host.path.unlink()
    host.clock.time += 60
    await counting.refresh()
    assert counting.problems() == (None,)
    after = host.controller()
    await after.refresh()
    assert _sums(after) == (5, 2)


async def test_since_when_each_read_is_counted_begins_anew_when_only_a_sample_was(
    host: _Host,
) -> None:
    host.workers.counts = {1: (0, 0)}
    found = []
    for one_in in (20, 1, 1, 0, 1):
        host.one_in = one_in
        counting = host.controller()
        await counting.refresh()
        await counting.save()
        found.append((counting.ledger.since - 1e9, counting.ledger.all_since))
        host.clock.time += 100
    begun = 1e9
    assert [since for since, _ in found] == [100.0, 100.0, 100.0, 100.0, 500.0]
    assert [each for _, each in found] == [None, begun + 200, begun + 200, None, begun + 500]


async def test_of_one_instance_only_its_own_reads_are_reported_and_judged(host: _Host) -> None:
    host.workers.counts = {1: (5, 2)}
    counting, inventory = host.controller(), Inventory(["sqlite"])

    async def report(instance: str) -> InstanceTokens:
        return await counting.report_instance(inventory, PolicyBook, InstanceId(instance))

    reads, none = await report("vm-1"), await report("vm-2")
    assert [(one.network, one.reads, one.refused) for one in reads.guests] == [("blue", 5, 2)]
    assert (reads.verdict.scope, reads.verdict.id, reads.verdict.ready) == (
        "instance",
        "vm-1",
        "no",
    )
    assert none.guests == ()
    # Nothing is known of the days before.
    assert none.verdict.ready == "unknown"


async def test_a_report_on_very_many_instances_takes_turns_with_other_work(host: _Host) -> None:
    turn, turns = 0, list[int]()
    names = [InstanceId(f"vm-{number}") for number in range(3 * AT_ONCE)]
    known = {name: Instance(name, name, name, project="shop") for name in names}

    class Watched(dict[InstanceId, Instance]):
        def get(self, *asked: Any) -> Any:
            turns.append(turn)
            return super().get(*asked)

    async def other() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    watched = cast("Inventory", SimpleNamespace(instances=Watched(known), networks={}))
    host.workers.counts[1] = 5, 0
    async with background(other()):
        report = await host.controller().report_tokens(watched, PolicyBook, 7)
    assert [one.id for one in report.verdicts] == ["", "shop"]
    assert len(set(turns)) >= 3
    assert max(Counter(turns).values()) <= 2 * AT_ONCE
