"""Writing through the admin API: refused with the fields, or in force when it returns."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from imdsproxy.admin.records import RecordService
from imdsproxy.app.tickets import Tickets
from imdsproxy.core.endpoints import Endpoint, LeftOut, LeftOutCode
from imdsproxy.core.hoststate import Family, NamespaceRef, ObservedHost, ObservedNamespace
from imdsproxy.core.inventory import Inventory
from imdsproxy.core.model import (
    METADATA_IPV4,
    Instance,
    InstanceId,
    NamespaceListener,
    Network,
    NetworkId,
    Port,
)
from imdsproxy.core.observation import AddressKey, Observation
from imdsproxy.errors import AlreadyExists, NotFound, SourceRefused
from imdsproxy.listeners.endpoints import find_degraded
from imdsproxy.listeners.loop import ListenerReport
from imdsproxy.sources.sqlite.source import SqliteSource

_RED = Network(NetworkId("red"), NamespaceListener("red"))
_BLUE = Network(NetworkId("blue"), NamespaceListener("blue"))


@dataclass
class _Loop:
    """A loop whose work is done at once; `report` is what its last round came to."""

    tickets: Tickets = field(default_factory=Tickets)
    report: ListenerReport = field(default_factory=lambda: ListenerReport(0.0))
    withheld: frozenset[AddressKey] = frozenset()
    seen: ObservedHost = field(default_factory=ObservedHost)
    now: ObservedHost = field(default_factory=ObservedHost)
    inventory: Inventory = field(default_factory=Inventory)

    @property
    def settler(self) -> _Loop:
        return self

    async def look_at(self, networks: Iterable[Network]) -> ObservedHost:
        assert list(networks)
        return self.now

    def degraded(self) -> tuple[LeftOut, ...]:
        endpoints, left_out = self.report.endpoints, self.report.left_out
        known = self.inventory.networks
        listening = {one.network: known[one.network] for one in endpoints}
        return find_degraded(listening, (), endpoints, left_out, ())


@dataclass
class Rig:
    inventory: Inventory
    writes: RecordService
    listeners: _Loop


def _web(network: str = "red", address: str = "10.0.0.5") -> Instance:
    port = Port(NetworkId(network), None, (IPv4Address(address),))
    return Instance(InstanceId("web"), "web", "web", ports=(port,), created_at=1)


@asynccontextmanager
async def _rig(directory: Path) -> AsyncIterator[Rig]:
    store = SqliteSource(directory / "store.sqlite")
    inventory = Inventory(["sqlite", "file"])
    known = asyncio.Event()

    def publish(observation: Observation) -> None:
        inventory.observe(observation)
        known.set()

    task = asyncio.create_task(store.run(publish))
    try:
        async with asyncio.timeout(30):
            await known.wait()
        listeners = _Loop(inventory=inventory)
        writes = RecordService(
            inventory,
            _Loop(),  # type: ignore[arg-type]  # the part that is used
            listeners,  # type: ignore[arg-type]  # as above
            store,
            lambda: (),
        )
        yield Rig(inventory, writes, listeners)
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_what_is_written_is_known(tmp_path: Path) -> None:
    async with _rig(tmp_path) as rig:
        assert (await rig.writes.put_records([_RED], [_web()])).applied
        assert rig.inventory.instances[InstanceId("web")] == _web()
        written = await rig.writes.remove_instance(InstanceId("web"))
        assert (written.instances, written.applied) == (1, True)
        assert not rig.inventory.instances
        await rig.writes.remove_network(_RED.id)
        assert not rig.inventory.networks


async def test_a_port_in_an_unknown_network_is_refused_with_its_field(tmp_path: Path) -> None:
    async with _rig(tmp_path) as rig:
        with pytest.raises(SourceRefused) as one:
            await rig.writes.put_instance(_web("nowhere"))
        assert [problem.field for problem in one.value.problems] == ["ports[0].network"]
        with pytest.raises(SourceRefused) as many:
            await rig.writes.put_records([_RED], [_web(), _web("nowhere")])
        assert [p.field for p in many.value.problems] == ["instances[1].ports[0].network"]
        assert not rig.inventory.networks


async def test_another_source_s_network_is_a_network(tmp_path: Path) -> None:
    async with _rig(tmp_path) as rig:
        rig.inventory.observe(Observation("file", full=True, networks={_BLUE.id: _BLUE}))
        await rig.writes.put_instance(_web("blue"))
        assert InstanceId("web") in rig.inventory.instances


async def test_another_source_s_record_is_changed_there(tmp_path: Path) -> None:
    async with _rig(tmp_path) as rig:
        rig.inventory.observe(
            Observation(
                "file", full=True, networks={_BLUE.id: _BLUE}, instances={_web().id: _web()}
            )
        )
        with pytest.raises(SourceRefused, match="belongs to source file"):
            await rig.writes.put_network(_BLUE)
        with pytest.raises(SourceRefused, match="belongs to source file"):
            await rig.writes.remove_instance(_web().id)


async def test_add_refuses_what_is_there_and_set_changes_it(tmp_path: Path) -> None:
    async with _rig(tmp_path) as rig:
        await rig.writes.put_network(_RED, create=True)
        with pytest.raises(AlreadyExists):
            await rig.writes.put_network(_RED, create=True)
        await rig.writes.put_instance(_web(), create=True)
        with pytest.raises(AlreadyExists):
            await rig.writes.put_instance(_web(), create=True)
        await rig.writes.put_instance(_web(address="10.0.0.6"))
        assert rig.inventory.instances[InstanceId("web")] == _web(address="10.0.0.6")


async def test_what_is_not_there_cannot_be_removed(tmp_path: Path) -> None:
    async with _rig(tmp_path) as rig:
        with pytest.raises(NotFound):
            await rig.writes.remove_network(NetworkId("red"))
        with pytest.raises(NotFound):
            await rig.writes.remove_instance(InstanceId("web"))


async def test_a_change_tells_only_of_its_own_networks_why_they_are_not_served(
    tmp_path: Path,
) -> None:
    async with _rig(tmp_path) as rig:
        rig.listeners.report = ListenerReport(
            0.0,
            left_out=tuple(
                LeftOut(one.id, None, LeftOutCode.NAMESPACE_MISSING, f"no namespace {one.id}")
                for one in (_RED, _BLUE)
            ),
        )
        written = await rig.writes.put_network(_RED)
        assert not written.applied
        assert written.pending == ("network red is not served: no namespace red",)


async def test_a_network_that_is_served_over_one_family_is_served(tmp_path: Path) -> None:
    async with _rig(tmp_path) as rig:
        endpoint = Endpoint(_RED.id, METADATA_IPV4, 80, None, NamespaceRef("red", 1))
        missing = LeftOut(_RED.id, Family.IPV6, LeftOutCode.ADDRESS_MISSING, "no fe80::a9fe:a9fe")
        rig.listeners.report = ListenerReport(0.0, endpoints=(endpoint,), left_out=(missing,))
        assert (await rig.writes.put_network(_RED)).applied


async def test_without_a_writable_source_nothing_can_be_written(tmp_path: Path) -> None:
    async with _rig(tmp_path) as rig:
        rig.writes.store = None
        with pytest.raises(SourceRefused, match="no source can be written to"):
            await rig.writes.put_network(_RED)


async def test_a_listener_in_use_is_refused_with_the_network_that_has_it(tmp_path: Path) -> None:
    async with _rig(tmp_path) as rig:
        rig.inventory.observe(Observation("file", full=True, networks={_BLUE.id: _BLUE}))
        second = Network(NetworkId("aqua"), NamespaceListener("blue", "br0"))
        with pytest.raises(SourceRefused) as one:
            await rig.writes.put_network(second)
        assert [problem.field for problem in one.value.problems] == ["listener"]
        assert "network blue has" in str(one.value)
        with pytest.raises(SourceRefused) as many:
            await rig.writes.put_records([_RED, second], [])
        assert [problem.field for problem in many.value.problems] == ["networks[1].listener"]
        with pytest.raises(SourceRefused):
            await rig.writes.put_records([_RED, replace(_RED, id=NetworkId("rose"))], [])
        await rig.writes.put_network(_RED)
        with pytest.raises(SourceRefused):
            await rig.writes.put_network(replace(_RED, listener=_BLUE.listener))
        assert set(rig.inventory.networks) == {"blue", "red"}


async def test_an_inode_that_a_namespace_had_before_another_one_refuses_nothing(
    tmp_path: Path,
) -> None:
    async with _rig(tmp_path) as rig:
        await rig.writes.put_network(_RED)
        rig.listeners.seen = _named(red=1, blue=1)
        rig.listeners.now = _named(red=1, blue=1)
        with pytest.raises(SourceRefused):
            await rig.writes.put_network(_BLUE)
        rig.listeners.now = _named(red=1, blue=2)
        await rig.writes.put_network(_BLUE)
        assert _BLUE.id in rig.inventory.networks


def _named(**inodes: int) -> ObservedHost:
    """A host with these namespaces."""
    return ObservedHost(
        namespaces={
            name: ObservedNamespace(NamespaceRef(name, inode)) for name, inode in inodes.items()
        }
    )


async def test_of_two_networks_added_at_once_on_one_listener_one_is_refused(tmp_path: Path) -> None:
    async with _rig(tmp_path) as rig:
        puts = (rig.writes.put_network(replace(_RED, id=NetworkId(name))) for name in ("a", "b"))
        done = await asyncio.gather(*puts, return_exceptions=True)
        assert sorted(type(one).__name__ for one in done) == ["SourceRefused", "Written"]
        assert len(rig.inventory.networks) == 1


async def test_a_network_that_shares_its_listener_already_can_be_changed_otherwise(
    tmp_path: Path,
) -> None:
    async with _rig(tmp_path) as rig:
        await rig.writes.put_network(_RED)
        second = replace(_RED, id=NetworkId("rose"))
        rig.inventory.observe(Observation("file", full=True, networks={second.id: second}))
        await rig.writes.put_network(replace(_RED, name="Red"))
        assert rig.inventory.networks[_RED.id].name == "Red"


async def test_a_listener_that_is_coming_is_waited_for(tmp_path: Path) -> None:
    async with _rig(tmp_path) as rig:
        coming = LeftOut(_RED.id, None, LeftOutCode.PENDING, "being made")
        rig.listeners.report = ListenerReport(0.0, left_out=(coming,))
        asyncio.get_running_loop().call_later(
            0.1, lambda: setattr(rig.listeners, "report", ListenerReport(0.0))
        )
        assert (await rig.writes.put_network(_RED)).applied
