"""The journal of where we have put addresses, and tables that nft(8) replaces."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest.mock import AsyncMock, Mock

import pytest

from imdsproxy.core.hostnames import Naming
from imdsproxy.core.hoststate import (
    Family,
    NamespaceRef,
    ObservedAddress,
    ObservedDevice,
    ObservedHost,
    ObservedNamespace,
)
from imdsproxy.core.model import (
    METADATA_IPV4,
    METADATA_IPV6,
    InterfaceListener,
    NamespaceListener,
    Network,
    NetworkId,
)
from imdsproxy.errors import HostRefused, Problem
from imdsproxy.host.namespaces import NamespaceDirectory, NamespaceThread
from imdsproxy.listeners.apply import NftTable
from imdsproxy.listeners.host import SystemHost
from imdsproxy.listeners.plan import AddAddress, DeleteLink, HostOp, ListenerPlan, RemoveAddress

_ADD = AddAddress(NetworkId("red"), "red", "eth0", METADATA_IPV4, 200)
_ROOT = AddAddress(NetworkId("blue"), None, "virbr0", METADATA_IPV4, 200)
_REMOVE = RemoveAddress("red", "eth0", METADATA_IPV4, 32)


@dataclass
class _Kernel:
    """Refuses or does each op, and notes whether the journal was there before."""

    journal: Path
    fails: bool = False
    noted_first: bool = False

    async def apply(self, _: object, ops: tuple[HostOp, ...]) -> dict[HostOp, Problem]:
        self.noted_first = self.journal.exists()
        return dict.fromkeys(ops, Problem("host", "no")) if self.fails else {}


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Kernel:
    kernel = _Kernel(tmp_path / "managed.json")
    monkeypatch.setattr("imdsproxy.listeners.host.apply_ops", kernel.apply)
    return kernel


def _host(kernel: _Kernel) -> SystemHost:
    links = kernel.journal.with_name("netns")
    return SystemHost(Mock(), Naming(), links=links, journal=kernel.journal)


async def test_a_place_is_noted_before_anything_is_put_there(kernel: _Kernel) -> None:
    kernel.fails = True
    host = _host(kernel)
    assert host.managed() == frozenset()
    await host.apply([_ADD, _ROOT])
    assert kernel.noted_first
    assert _host(kernel).managed() == {("red", "eth0"), (None, "virbr0")}


async def test_a_place_is_struck_out_when_it_is_free_again(kernel: _Kernel) -> None:
    host = _host(kernel)
    await host.apply([_ADD, _ROOT])
    await host.apply([_REMOVE])
    assert host.managed() == {(None, "virbr0")}


async def test_what_changes_no_address_leaves_the_journal_alone(kernel: _Kernel) -> None:
    await _host(kernel).apply([_ADD])
    before = kernel.journal.stat()
    await _host(kernel).apply([DeleteLink("imds0")])
    assert kernel.journal.stat() == before


async def test_a_removal_that_failed_is_still_to_be_done(kernel: _Kernel) -> None:
    await _host(kernel).apply([_ADD])
    kernel.fails = True
    await _host(kernel).apply([_REMOVE])
    assert _host(kernel).managed() == {("red", "eth0")}


async def test_a_place_with_an_address_that_could_not_be_removed_is_not_struck_out(
    kernel: _Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    await _host(kernel).apply([_ADD])
    other = replace(_REMOVE, address=METADATA_IPV6)
    refused = AsyncMock(return_value={_REMOVE: Problem("host", "no")})
    monkeypatch.setattr("imdsproxy.listeners.host.apply_ops", refused)
    await _host(kernel).apply([_REMOVE, other])
    assert _host(kernel).managed() == {("red", "eth0")}


def test_a_damaged_journal_says_who_must_act(kernel: _Kernel) -> None:
    kernel.journal.write_text("{")
    with pytest.raises(HostRefused, match=r"managed\.json"):
        _host(kernel).managed()


@pytest.mark.parametrize("everything", [True, False])
async def test_after_a_look_that_failed_all_is_looked_at_and_not_taken_for_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, everything: bool
) -> None:
    name, thread = NetworkId("blue"), NamespaceThread(NamespaceDirectory(tmp_path))
    host = SystemHost(thread, Naming(), links=tmp_path / "links", journal=tmp_path / "journal")
    for table in ("arp_guard", "diverter"):
        monkeypatch.setattr(host, table, Mock(apply=AsyncMock(return_value=())))
    networks = {name: Network(name, InterfaceListener("none"))}
    await host.settle(networks, {})
    before = host.seen
    host.touch(None if everything else [name])
    refused = OSError(errno.EMFILE, "no descriptors left")
    with monkeypatch.context() as patched:
        patched.setattr("imdsproxy.listeners.host.NetlinkSocket", Mock(side_effect=refused))
        with pytest.raises(HostRefused):
            await host.settle(networks, {})
    await host.settle(networks, {})
    assert "lo" in host.seen.root.devices
    assert host.seen is not before
    thread.close()


@dataclass
class _Looks:
    """A host with one network, what it was asked for at each look, and the namespace that a look finds."""

    host: SystemHost
    found: ObservedNamespace
    asked: list[tuple[bool, set[NetworkId]]] = field(default_factory=list)
    during: Callable[[], object] = lambda: None

    async def observe(
        self, networks: Iterable[Network], _: object = (), *, everything: bool = False
    ) -> ObservedHost:
        self.asked.append((everything, {one.id for one in networks}))
        self.during()
        asked = None if everything else frozenset({"red"})
        return ObservedHost(namespaces={"red": self.found}, asked=asked)

    async def settle(self) -> ListenerPlan:
        red = NetworkId("red")
        return await self.host.settle(
            {red: Network(red, NamespaceListener("red", "eth0", True))}, {}
        )


@pytest.fixture
def looks(kernel: _Kernel, monkeypatch: pytest.MonkeyPatch) -> _Looks:
    eth0 = ObservedDevice("eth0", 2, up=True, mtu=1500)
    found = ObservedNamespace(NamespaceRef("red", 7), {"eth0": eth0})
    looks = _Looks(_host(kernel), found)
    for name in ("arp_guard", "diverter"):
        monkeypatch.setattr(looks.host, name, Mock(apply=AsyncMock(return_value=())))
    monkeypatch.setattr(looks.host, "observe", looks.observe)
    return looks


async def test_what_was_made_is_looked_at_and_planned_with_in_the_same_round(
    looks: _Looks, kernel: _Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def apply(thread: object, ops: tuple[HostOp, ...]) -> dict[HostOp, Problem]:
        both = tuple(ObservedAddress("eth0", one.metadata_address, 32) for one in Family)
        looks.found = replace(looks.found, addresses=both)
        return await kernel.apply(thread, ops)

    monkeypatch.setattr("imdsproxy.listeners.host.apply_ops", apply)
    plan = await looks.settle()
    assert looks.asked == [(True, {"red"}), (False, {"red"})]
    assert (plan.left_out, len(plan.endpoints), plan.operations) == ((), 2, 2)


async def test_who_asks_for_everything_during_a_look_gets_another_one(looks: _Looks) -> None:
    looks.during = lambda: looks.host.touch(None)
    await looks.settle()
    looks.during = lambda: None
    looks.asked.clear()
    await looks.settle()
    assert looks.asked[0] == (True, {"red"})


def _table(directory: Path, *, status: int = 0) -> NftTable:
    """A table whose nft(8) logs its input, and answers with `status`."""
    program = directory / "nft"
    program.write_text(
        f"#!/bin/sh\ncat >> {directory}/log\necho no such thing >&2\nexit {status}\n"
    )
    program.chmod(0o755)
    return NftTable("cannot redirect", "until then", str(program))


async def test_nft_is_run_only_when_something_changes(tmp_path: Path) -> None:
    table = _table(tmp_path)
    for script in ("a{ ", "a{ ", "b "):
        assert await table.apply(script) == ()
    assert (tmp_path / "log").read_text() == "a{ b "


async def test_a_refusal_is_a_problem_and_the_change_is_tried_again(tmp_path: Path) -> None:
    table = _table(tmp_path, status=1)
    for _ in range(2):
        (problem,) = await table.apply("a{ ")
        assert (problem.reason.split(":")[0], problem.hint) == ("cannot redirect", "until then")
        assert "no such thing" in problem.reason
    _table(tmp_path)
    for _ in range(2):
        assert await table.apply("a{ ") == ()
    assert (tmp_path / "log").read_text() == "a{ a{ a{ "


async def test_nft_and_its_tables_are_missed_only_where_a_table_is_wanted(tmp_path: Path) -> None:
    # A kernel without such tables has none to remove.
    assert await _table(tmp_path, status=1).apply("a ") == ()
    table = NftTable("cannot redirect", "until then", str(tmp_path / "none"))
    assert await table.apply("a ") == ()
    (problem,) = await table.apply("a{ ")
    assert problem.reason == "cannot redirect: no nft"
