"""What every source of records promises, whatever it reads.

A source joins by adding a backing of its own to `BACKINGS`: how a test writes what the source reads. `source` gives a
new source that reads it (one runs at a time); `put`, `remove_instance` and `remove_network` write while it runs, and
give what refused a record at the door; `spoil` and `claim_twice` write while none does: a record that is refused (and
how the problem's field begins), and one with all of another's addresses; `seen` is what the source makes of a record.
Neutron's is read as a list. Its ports are no whole records (no network is described, there are no documents, and
Neutron itself keeps the addresses of two ports apart), and what the suite asks of those is asked only of the sources
in `KEEPERS`.
"""

import asyncio
import json
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Final, TypeAlias

import pytest

from imdsproxy.errors import Problem, SourceRefused
from imdsproxy.model.entities import Instance, InstanceId, Network, NetworkId
from imdsproxy.model.records import render_record
from imdsproxy.sources.api import Source
from imdsproxy.sources.file.source import FileSource
from imdsproxy.sources.sqlite.source import SqliteSource
from support.fleet_backing import FleetBacking
from support.libvirt_backing import LibvirtBacking
from support.neutron_backing import NeutronBacking
from support.record_builders import instance, network, port
from support.source_runs import Heard, WholeRecords, running

A: Final = instance("a", "10.0.0.5", mac="52:54:00:00:00:05")
B: Final = instance("b", "10.0.0.6", mac="52:54:00:00:00:06")
C: Final = instance("c", "10.0.0.5", mac="52:54:00:00:00:05")
N1: Final = network("n1")
N2: Final = network("n2", bridge="br2")
_NOW: Final = 1_795_694_400


class FileBacking(WholeRecords):
    """Two files in a directory, written as editors do: beside, then renamed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory / "records"
        self._directory.mkdir()
        self._records: dict[str, dict[str, object]] = {"networks": {}, "instances": {}}
        self._sources = 0

    def source(self) -> Source:
        # Without what another one has kept.
        self._sources += 1
        return FileSource(self._directory, self._directory.with_name(f"{self._sources}.sqlite"))

    async def put(
        self, networks: Iterable[Network] = (), instances: Iterable[Instance] = ()
    ) -> tuple[Problem, ...]:
        self._records["networks"].update({each.id: render_record(each) for each in networks})
        self._records["instances"].update({each.id: render_record(each) for each in instances})
        self._write()
        return ()

    async def remove_network(self, network_id: str) -> None:
        del self._records["networks"][network_id]
        self._write()

    async def remove_instance(self, instance_id: str) -> None:
        del self._records["instances"][instance_id]
        self._write()

    async def spoil(self, instance_id: str) -> str:
        self._records["instances"][instance_id] = {"id": instance_id, "name": 7}
        self._write()
        return "instances"

    async def claim_twice(self, victim: Instance, thief_id: str) -> tuple[Problem, ...]:
        return await self.put([], [replace(victim, id=InstanceId(thief_id))])

    def _write(self) -> None:
        for kind, records in self._records.items():
            path = self._directory / f"{kind}.json"
            beside = path.with_suffix(".json~")
            beside.write_text(json.dumps({kind: list(records.values())}))
            beside.rename(path)


class SqliteBacking(WholeRecords):
    """The embedded store, written through the source itself; garbage goes in behind its back."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "store.sqlite"
        self._source = SqliteSource(self._path)
        self._spoilt: set[str] = set()

    def source(self) -> Source:
        self._source = SqliteSource(self._path, now=lambda: _NOW)
        return self._source

    def seen(self, instance: Instance) -> Instance:
        # The creation time of an instance that replaces garbage is unknown.
        return replace(instance, created_at=None if instance.id in self._spoilt else _NOW)

    async def put(
        self, networks: Iterable[Network] = (), instances: Iterable[Instance] = ()
    ) -> tuple[Problem, ...]:
        try:
            await self._source.put(tuple(networks), tuple(instances), bulk=True)
        except SourceRefused as refusal:
            return refusal.problems
        return ()

    async def remove_network(self, network_id: str) -> None:
        await self._source.remove_network(NetworkId(network_id))

    async def remove_instance(self, instance_id: str) -> None:
        await self._source.remove_instance(InstanceId(instance_id))

    async def spoil(self, instance_id: str) -> str:
        self._spoilt.add(instance_id)
        self._store(instance_id, '{"id": "')
        return "instances"

    async def claim_twice(self, victim: Instance, thief_id: str) -> tuple[Problem, ...]:
        thief = replace(victim, id=InstanceId(thief_id))
        self._store(thief_id, json.dumps(render_record(thief)))
        return ()

    def _store(self, instance_id: str, record: str) -> None:
        with closing(sqlite3.connect(self._path)) as connection, connection:
            statement = "INSERT OR REPLACE INTO instances (id, record) VALUES (?, ?)"
            connection.execute(statement, (instance_id, record))


Keeper: TypeAlias = FileBacking | SqliteBacking | LibvirtBacking | FleetBacking
"""One whose records are whole: networks, and all that documents are made of."""

Backing: TypeAlias = Keeper | NeutronBacking

KEEPERS: Final[dict[str, Callable[[Path], Keeper]]] = {
    "file": FileBacking,
    "sqlite": SqliteBacking,
    "libvirt": LibvirtBacking,
    "fleet": FleetBacking,
}
BACKINGS: Final[dict[str, Callable[[Path], Backing]]] = {**KEEPERS, "neutron": NeutronBacking}


@pytest.fixture(params=BACKINGS)
def backing(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Backing]:
    """Of any source."""
    yield (made := BACKINGS[str(request.param)](tmp_path))
    made.close()


@pytest.fixture(params=KEEPERS)
def keeper(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Keeper]:
    """Of a source whose records are whole."""
    yield (made := KEEPERS[str(request.param)](tmp_path))
    made.close()


def has(backing: Backing, *instances: Instance) -> Callable[[Heard], bool]:
    wanted = {each.id: backing.seen(each) for each in instances}
    return lambda heard: dict(heard.inventory.instances) == wanted and not heard.last.more


async def fill(backing: Backing, *instances: Instance) -> None:
    async with running(backing.source()) as heard:
        assert not await backing.put([N1], instances)
        await heard.until(has(backing, *instances))


async def test_the_first_report_is_everything_and_in_sync(backing: Backing) -> None:
    async with running(backing.source()) as heard:
        (first,) = heard.observations
        assert (first.full, first.in_sync) == (True, True)
        assert not [*first.networks, *first.instances, *first.problems]
    await fill(backing, A, B)
    async with running(backing.source()) as heard:
        first = heard.observations[0]
        assert (first.full, first.in_sync, first.source) == (True, True, backing.source().name)
        assert dict(first.instances) == {"a": backing.seen(A), "b": backing.seen(B)}


async def test_after_the_first_report_only_changes_are_reported(backing: Backing) -> None:
    await fill(backing, A)
    async with running(backing.source()) as heard:
        await backing.put([N1], [A])
        await backing.put([], [B])
        await heard.until(has(backing, A, B))
        changed = replace(B, ports=(port("n1", "10.0.0.7", mac="52:54:00:00:00:07"),))
        assert not await backing.put([], [changed])
        await heard.until(has(backing, A, changed))
        assert heard.owners["n1/fe80::5054:ff:fe00:7"] == "b"
        assert [each.full for each in heard.observations].count(True) == 1
        assert all(A.id not in each.instances for each in heard.observations[1:])
        await backing.remove_instance("a")
        # Its address is free again.
        await backing.put([], [C])
        await heard.until(has(backing, changed, C))


async def test_networks_are_reported_when_they_come_change_and_go(keeper: Keeper) -> None:
    await fill(keeper, A)
    async with running(keeper.source()) as heard:
        assert dict(heard.observations[0].networks) == {"n1": N1}
        changed = replace(N1, mtu=1400)
        await keeper.put([changed])
        await heard.until(lambda each: dict(each.inventory.networks) == {"n1": changed})
        await keeper.remove_instance("a")
        await keeper.remove_network("n1")
        await heard.until(lambda each: not each.inventory.networks)


async def test_a_restart_reports_what_the_run_before_ended_with(backing: Backing) -> None:
    await fill(backing, A, B)
    async with running(backing.source()) as heard:
        await backing.put(
            [N2], [replace(A, ports=(port("n2", "10.0.0.5", mac="52:54:00:00:00:05"),))]
        )
        await backing.remove_instance("b")
        await heard.until(
            lambda each: (
                each.owners.get("n2/10.0.0.5") == "a" and "b" not in each.inventory.instances
            )
        )
        networks, instances = dict(heard.inventory.networks), dict(heard.inventory.instances)
    async with running(backing.source()) as again:
        assert dict(again.observations[0].networks) == networks
        assert dict(again.observations[0].instances) == instances


@pytest.mark.parametrize("end", ["gone", "mended"])
async def test_a_record_that_is_garbage_is_refused_alone_and_reported_until_it_is_gone_or_mended(
    backing: Backing, end: str
) -> None:
    await fill(backing, A, B)
    field = await backing.spoil("b")
    async with running(backing.source()) as heard:
        assert heard.observations[0].in_sync
        await heard.until(has(backing, A))
        assert heard.last.problems
        for problem in heard.last.problems:
            assert problem.field.startswith(field)
            assert problem.hint or problem.reason
            assert problem.file or isinstance(backing, NeutronBacking)
        other = replace(A, ports=(port("n1", "10.0.0.9", mac="52:54:00:00:00:05"),))
        await backing.put([], [other])
        await heard.until(has(backing, other))
        assert heard.last.problems
        await (backing.put([], [B]) if end == "mended" else backing.remove_instance("b"))
        await heard.until(lambda each: not each.last.problems)
        assert has(backing, other, *([B] if end == "mended" else []))(heard)


@pytest.mark.parametrize("thief", [C, A], ids=["newcomer", "one that moves"])
async def test_who_wants_an_address_in_force_does_not_get_it_and_keeps_its_own(
    keeper: Keeper, thief: Instance
) -> None:
    await fill(keeper, A, B)
    async with running(keeper.source()) as heard:
        ports = (port("n1", "10.0.0.7", "10.0.0.6", mac="52:54:00:00:00:07"),)
        refused = await keeper.put([], [replace(thief, ports=ports)])
        await heard.until(lambda each: refused or each.last.problems)
        (problem,) = refused or heard.last.problems
        assert problem.field.endswith(".ports[0].addresses[1]")
        assert "10.0.0.6" in problem.reason
        assert "instance b" in problem.reason
        assert has(keeper, A, B)(heard)


async def test_two_records_with_one_address_from_the_start_leave_it_to_the_first(
    keeper: Keeper,
) -> None:
    await fill(keeper, A)
    refused = await keeper.claim_twice(A, "b")
    async with running(keeper.source()) as heard:
        assert has(keeper, A)(heard)
        problems = (*refused, *heard.last.problems)
        assert any("10.0.0.5" in problem.reason for problem in problems)


async def test_two_instances_that_swap_addresses_at_once_are_in_force_swapped(
    backing: Backing,
) -> None:
    await fill(backing, A, B)
    swapped = replace(A, ports=B.ports), replace(B, ports=A.ports)
    async with running(backing.source()) as heard:
        assert not await backing.put([], swapped)
        await heard.until(has(backing, *swapped))
        assert not heard.last.problems


@pytest.mark.parametrize("kind", ["file", "sqlite"])
async def test_many_records_are_reported_in_pieces_and_moved_addresses_at_once(
    kind: str, tmp_path: Path
) -> None:
    backing = BACKINGS[kind](tmp_path)
    many = [instance(f"i{n}", f"10.0.{n // 200}.{n % 200}") for n in range(500)]
    edited = [replace(each, hostname="edited") for each in many]
    moved = [replace(one, ports=two.ports) for one, two in zip(many, many[::-1], strict=True)]
    sizes = []
    async with running(backing.source()) as heard:
        for records in (many, edited, moved):
            seen = len(heard.observations)
            await backing.put([], records)
            await heard.until(has(backing, *records))
            sizes.append([len(each.instances) for each in heard.observations[seen:]])
    assert sizes == [[0, 200, 200, 100, 500], [0, 200, 200, 100, 500], [500]]


async def test_a_cancelled_source_leaves_no_thread_and_can_be_run_again(backing: Backing) -> None:
    before = set(threading.enumerate())
    await fill(backing, A)
    # The event loop's own pool stays until it closes; a source's threads are named.
    async with asyncio.timeout(30):
        while any(one.name.startswith("imdsproxy") for one in {*threading.enumerate()} - before):
            await asyncio.sleep(0.01)
    await fill(backing, A)
