"""The journal of where we have put addresses."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import cast

import pytest

from imdsproxy.core.hostnames import Naming
from imdsproxy.core.model import METADATA_IPV4, NetworkId
from imdsproxy.errors import HostRefused
from imdsproxy.host.namespaces import NamespaceThread
from imdsproxy.listeners.apply import HostApplier
from imdsproxy.listeners.host import SystemHost
from imdsproxy.listeners.observe import HostObserver
from imdsproxy.listeners.ops import AddAddress, HostOp, OpFailure, RemoveAddress

_ADD = AddAddress(NetworkId("red"), "red", "eth0", METADATA_IPV4, 32, 200)
_ROOT = AddAddress(NetworkId("blue"), None, "virbr0", METADATA_IPV4, 32, 200)
_REMOVE = RemoveAddress("red", "eth0", METADATA_IPV4, 32)


class _Applier:
    """Says what becomes of each op, and whether the journal was there before."""

    def __init__(self, journal: Path, *, fails: bool = False) -> None:
        self.journal = journal
        self.fails = fails
        self.noted_first = False

    async def apply(self, ops: Iterable[HostOp]) -> tuple[OpFailure, ...]:
        self.noted_first = self.journal.exists()
        return tuple(OpFailure(op, "no") for op in ops if self.fails)


def _host(tmp_path: Path, applier: _Applier) -> SystemHost:
    return SystemHost(
        cast("NamespaceThread", None),
        Naming(),
        observer=cast("HostObserver", None),
        applier=cast("HostApplier", applier),
        links=tmp_path / "netns",
        journal=tmp_path / "managed.json",
    )


async def test_a_place_is_noted_before_anything_is_put_there(tmp_path: Path) -> None:
    applier = _Applier(tmp_path / "managed.json", fails=True)
    host = _host(tmp_path, applier)
    assert host.managed() == frozenset()
    await host.apply([_ADD, _ROOT])
    assert applier.noted_first
    assert _host(tmp_path, applier).managed() == {("red", "eth0"), (None, "virbr0")}


async def test_a_place_is_struck_out_when_it_is_free_again(tmp_path: Path) -> None:
    host = _host(tmp_path, _Applier(tmp_path / "managed.json"))
    await host.apply([_ADD, _ROOT])
    await host.apply([_REMOVE])
    assert host.managed() == {(None, "virbr0")}


async def test_a_removal_that_failed_is_still_to_be_done(tmp_path: Path) -> None:
    await _host(tmp_path, _Applier(tmp_path / "managed.json")).apply([_ADD])
    failing = _host(tmp_path, _Applier(tmp_path / "managed.json", fails=True))
    await failing.apply([_REMOVE])
    assert failing.managed() == {("red", "eth0")}


def test_a_damaged_journal_says_who_must_act(tmp_path: Path) -> None:
    (tmp_path / "managed.json").write_text("{")
    with pytest.raises(HostRefused, match=r"managed\.json"):
        _host(tmp_path, _Applier(tmp_path / "managed.json")).managed()
