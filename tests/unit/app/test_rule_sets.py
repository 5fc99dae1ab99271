"""A set of path rules is on disk and in every worker before a record refers to it, and goes when none does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from imdsproxy.app.rule_sets import RuleSets
from imdsproxy.core.haproxy.maps import parse_map
from imdsproxy.core.path_rules import PathRules, PathWord, render_set, set_id
from imdsproxy.core.policy import OperatorOverride, Policy, render_policy_word
from imdsproxy.dataplane.layout import Layout
from imdsproxy.dataplane.records import RecordApplier
from imdsproxy.errors import HostRefused, RuntimeUnavailable
from support.fake_haproxy import FakeHaproxy
from support.hand_clock import HandClock

_ONE: PathRules = (("/latest/user-data", PathWord.DENY),)
_TWO: PathRules = (("/", PathWord.REQUIRED),)


def _sets(*rules: PathRules) -> dict[str, PathRules]:
    return {set_id(one): one for one in rules}


def _record(rules: PathRules) -> str:
    return f"{render_policy_word(Policy(paths=rules), OperatorOverride(), None)}|web|r1"


@dataclass
class Rig:
    directory: Path
    clock: HandClock = field(default_factory=HandClock)

    def __post_init__(self) -> None:
        layout = Layout(self.directory, self.directory)
        self.path = layout.path_rules_map
        self.applier = RecordApplier(layout)
        self.applier.write_all({})
        maps = (layout.base_map, layout.overlay_map, self.path)
        self.haproxy = FakeHaproxy(layout.master_socket, maps)
        self.sets = self.begun()

    def begun(self) -> RuleSets:
        """As a controller has it that starts now."""
        sets = RuleSets(self.applier, self.clock)
        sets.load()
        return sets

    def on_disk(self) -> Mapping[str, str]:
        return parse_map(self.path.read_text())[1]

    def in_workers(self) -> list[Mapping[str, str]]:
        return [dict(worker.maps[str(self.path)]) for worker in self.haproxy.all()]

    def have(self, *rules: PathRules) -> None:
        """All workers, and the disk, have these and no others."""
        wanted = {key: value for one in rules for key, value in render_set(one).items()}
        assert self.on_disk() == wanted
        assert self.in_workers() == [wanted] * len(self.haproxy.all())


@asynccontextmanager
async def _rig(directory: Path) -> AsyncIterator[Rig]:
    rig = Rig(directory)
    await rig.haproxy.start()
    try:
        yield rig
    finally:
        await rig.haproxy.close()


async def test_the_file_is_there_before_anything_is_said_and_nobody_is_told(tmp_path: Path) -> None:
    async with _rig(tmp_path) as rig:
        assert rig.on_disk() == {}
        for sweep in (False, True):
            await rig.sets.ensure({}, sweep=sweep)
        assert rig.haproxy.commands == []


async def test_a_new_set_is_in_every_worker_draining_ones_too(tmp_path: Path) -> None:
    async with _rig(tmp_path) as rig:
        await rig.applier.master.send_reload()
        assert len(rig.haproxy.all()) == 2
        await rig.sets.ensure(_sets(_ONE), sweep=False)
        rig.have(_ONE)
        await rig.sets.ensure(_sets(_TWO), sweep=False)
        rig.have(_ONE, _TWO)
        told = len(rig.haproxy.commands)
        await rig.sets.ensure(_sets(_ONE, _TWO), sweep=False)
        assert len(rig.haproxy.commands) == told, "nobody is told what he knows"


async def test_a_set_goes_when_no_record_has_referred_to_it_for_a_minute(tmp_path: Path) -> None:
    async with _rig(tmp_path) as rig:
        await rig.sets.ensure(_sets(_ONE, _TWO), sweep=False)
        await rig.applier.apply({"red/10.0.0.5": _record(_ONE), "red/10.0.0.6": _record(_TWO)})
        rig.clock.time += 3600
        await rig.sets.ensure({}, sweep=True)
        await rig.applier.apply({"red/10.0.0.6": None})
        # A request that has looked the record up before may be under way.
        rig.clock.time += 59
        await rig.sets.ensure({}, sweep=True)
        rig.have(_ONE, _TWO)
        rig.clock.time += 1
        await rig.sets.ensure({}, sweep=True)
        rig.have(_ONE)


async def test_what_an_earlier_controller_left_stays_while_records_refer_to_it(
    tmp_path: Path,
) -> None:
    async with _rig(tmp_path) as rig:
        await rig.sets.ensure(_sets(_ONE), sweep=False)
        await rig.applier.apply({"red/10.0.0.5": _record(_ONE)})
        later = rig.begun()
        rig.clock.time += 3600
        await later.ensure(_sets(_TWO), sweep=True)
        rig.have(_ONE, _TWO)


async def test_a_haproxy_that_is_yet_to_start_finds_all_of_them(tmp_path: Path) -> None:
    async with _rig(tmp_path) as rig:
        await rig.sets.ensure(_sets(_ONE), sweep=False)
        later = rig.begun()
        later.preload(_sets(_TWO))
        assert rig.on_disk() == {**render_set(_ONE), **render_set(_TWO)}
        told = len(rig.haproxy.commands)
        await later.ensure(_sets(_ONE, _TWO), sweep=False)
        assert len(rig.haproxy.commands) == told


async def test_a_worker_that_may_have_missed_it_is_told_again(tmp_path: Path) -> None:
    async with _rig(tmp_path) as rig:
        rig.haproxy.stop_answering_after = 1
        with pytest.raises(RuntimeUnavailable):
            await rig.sets.ensure(_sets(_ONE), sweep=False)
        rig.haproxy.stop_answering_after = None
        await rig.sets.ensure(_sets(_ONE), sweep=False)
        rig.have(_ONE)


async def test_a_set_that_could_not_be_removed_everywhere_is_sent_again_when_it_is_needed(
    tmp_path: Path,
) -> None:
    async with _rig(tmp_path) as rig:
        await rig.sets.ensure(_sets(_ONE), sweep=False)
        rig.clock.time += 3600
        rig.haproxy.stop_answering_after = 1
        with pytest.raises(RuntimeUnavailable):
            await rig.sets.ensure({}, sweep=True)
        rig.haproxy.stop_answering_after = None
        await rig.sets.ensure(_sets(_ONE), sweep=False)
        rig.have(_ONE)


async def test_a_worker_that_somebody_else_has_started_gets_them_before_its_records(
    tmp_path: Path,
) -> None:
    async with _rig(tmp_path) as rig:
        rig.applier.trust(await rig.applier.master.read_processes())
        await rig.sets.ensure(_sets(_ONE), sweep=False)
        stranger = rig.haproxy.fork()
        stranger.maps[str(rig.path)] = []
        rig.haproxy.workers.append(stranger)
        await rig.applier.apply({"red/10.0.0.5": _record(_ONE)})
        rig.have(_ONE)
        paths = [line.split()[2] for pid, line in rig.haproxy.commands if pid == stranger.pid]
        assert paths.index(str(rig.path)) < paths.index(str(tmp_path / "overlay.map"))


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "path-rules.map").write_bytes(b"\xff\xfe")
    with pytest.raises(HostRefused, match="path-rules"):
        Rig(tmp_path)
