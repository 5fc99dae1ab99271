"""What operators do about tokens and boots: refused, or in every worker when it returns, or told why not."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import pytest

from imdsproxy.admin import tokens
from imdsproxy.admin.tokens import GuardChange, TokenService
from imdsproxy.app.policy_store import OverrideFile, PolicyStore
from imdsproxy.app.record_loop import RecordLoop
from imdsproxy.app.tickets import Tickets
from imdsproxy.app.token_keys import TokenKeys
from imdsproxy.core.haproxy.maps import MapState
from imdsproxy.core.identity import Learned
from imdsproxy.core.inventory import Inventory
from imdsproxy.core.model import InstanceId
from imdsproxy.core.observation import AddressKey
from imdsproxy.core.policy import OperatorOverride
from imdsproxy.dataplane.records import RecordApplier
from imdsproxy.errors import NotFound, Problem
from imdsproxy.host.clock import SystemClock
from support.record_builders import full, instance, key, network

_WEB = InstanceId("web")
_NOW = 1_795_694_400


class _Noon(SystemClock):
    def now(self) -> datetime:
        return datetime.fromtimestamp(_NOW + 0.9, UTC)


@dataclass
class _Applier:
    state: MapState = field(default_factory=MapState)

    async def apply_table(
        self, path: Path, entries: Mapping[str, str], write: Callable[[], None]
    ) -> None:
        del path, entries
        write()


@dataclass
class _Records:
    """A record loop whose rounds end when a test says so."""

    tickets: Tickets = field(default_factory=Tickets)
    learned: dict[AddressKey, Learned] = field(default_factory=dict)
    touched: set[AddressKey] = field(default_factory=set)
    applier: _Applier = field(default_factory=_Applier)

    def touch(self, address: AddressKey) -> int:
        self.touched.add(address)
        return self.tickets.take()

    async def end_round(self) -> None:
        await self.tickets.close(self.tickets.given)


def _put(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    path.chmod(0o600)


@dataclass
class Rig:
    directory: Path
    inventory: Inventory = field(default_factory=lambda: Inventory(["a", "b"]))
    records: _Records = field(default_factory=_Records)

    def __post_init__(self) -> None:
        self.file = OverrideFile(self.directory / "guards.json", _put)
        self.keys = TokenKeys(
            self.directory / "keys", self.directory / "map", _put, lambda size: b"k" * size
        )
        self.writes = TokenService(
            self.inventory,
            cast("RecordLoop", self.records),
            PolicyStore(self.keys, self.file),
            _Noon(),
            lambda: (Problem("records", "HAProxy does not answer"),),
        )

    def tell(self) -> None:
        web = instance("web", "10.0.0.5", "2001:db8::5")
        self.inventory.observe(full("a", [network("n1")], [web, instance("mail", "10.0.0.6")]))
        self.inventory.observe(full("b"))


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


@pytest.mark.parametrize(
    ("configured", "shared"), [(None, False), ("keys", False), ("theirs", True)]
)
async def test_a_revocation_tells_of_keys_that_other_hosts_have_too(
    rig: Rig, configured: str | None, *, shared: bool
) -> None:
    rig.keys.read(None)
    _put(rig.directory / "theirs", (rig.directory / "keys").read_bytes())
    path = None if configured is None else rig.directory / configured
    rig.keys.read(path)
    rig.tell()
    revoking = asyncio.create_task(rig.writes.revoke(_WEB))
    async with asyncio.timeout(30):
        while not rig.records.touched:
            await asyncio.sleep(0.01)
    await rig.records.end_round()
    assert (await revoking).shared == (str(path) if shared else None)


async def test_a_revocation_returns_when_every_address_is_in_force_and_not_before(rig: Rig) -> None:
    rig.tell()
    learned = key("n1", "fe80::5"), key("n1", "fe80::6")
    rig.records.learned = {
        learned[0]: Learned(_WEB, 0.0),
        learned[1]: Learned(InstanceId("mail"), 0.0),
    }
    revoking = asyncio.create_task(rig.writes.revoke(_WEB))
    done, _ = await asyncio.wait([revoking], timeout=0.1)
    assert not done
    assert rig.file.overrides == {_WEB: OperatorOverride(1)}, "on disk first"
    assert rig.records.touched == {key("n1", "10.0.0.5"), key("n1", "2001:db8::5"), learned[0]}
    await rig.records.end_round()
    assert await revoking == GuardChange(_WEB, 1)


async def test_a_boot_begins_anew_at_the_second_that_it_is(rig: Rig) -> None:
    rig.tell()
    reopening = asyncio.create_task(rig.writes.reopen(_WEB))
    while not rig.records.touched:
        await asyncio.sleep(0)
    await rig.records.end_round()
    assert await reopening == GuardChange(_WEB, 0, _NOW)
    assert rig.file.overrides == {_WEB: OperatorOverride(0, _NOW)}


async def test_two_at_once_are_two_epochs(rig: Rig) -> None:
    rig.tell()
    both = [asyncio.create_task(rig.writes.revoke(_WEB)) for _ in range(2)]
    while rig.file.overrides.get(_WEB) != OperatorOverride(2):
        await asyncio.sleep(0.01)
    while not all(one.done() for one in both):
        await rig.records.end_round()
        await asyncio.sleep(0.01)
    assert [one.result().epoch for one in both] == [1, 2]


@pytest.mark.parametrize("in_sync", [True, False])
async def test_nobody_s_instance_is_refused_with_a_hint(rig: Rig, *, in_sync: bool) -> None:
    if in_sync:
        rig.tell()
    for act in (rig.writes.revoke, rig.writes.reopen):
        with pytest.raises(NotFound, match="there is no instance nobody") as refused:
            await act(InstanceId("nobody"))
        assert refused.value.hint == (
            "imdsproxy instance list"
            if in_sync
            else "source a, b is not in sync yet and may tell of it: try again"
        )
    assert not (rig.directory / "guards.json").exists()


async def test_one_that_is_gone_and_was_dealt_with_before_can_be_again(rig: Rig) -> None:
    rig.tell()
    gone = InstanceId("gone")
    rig.file.revoke(gone)
    assert await rig.writes.revoke(gone) == GuardChange(gone, 2)


async def test_what_haproxy_knows_of_a_source_that_is_silent_is_told(rig: Rig) -> None:
    rig.file.revoke(_WEB)
    rig.records.applier.state.overlay["n1/10.0.0.5"] = "+1tooo--:1:0:64|web|0f3a9c"
    changed = await rig.writes.revoke(_WEB)
    assert (changed.epoch, changed.applied) == (2, False)
    assert "no source that is in sync reports it" in changed.pending[0]
    rig.records.applier.state.overlay["n1/10.0.0.5"] = "mail|0f3a9c"
    assert (await rig.writes.revoke(_WEB)).applied


async def test_what_is_not_confirmed_in_time_says_why(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "_APPLY_DEADLINE_S", 0.05)
    rig.tell()
    rig.keys.read(None)
    pending = ("the data plane has not confirmed it yet", "HAProxy does not answer")
    assert await rig.writes.revoke(_WEB) == GuardChange(
        _WEB, 1, None, applied=False, pending=pending
    )
    rotated = await rig.writes.rotate()
    assert (rotated.applied, rotated.pending) == (False, pending)


async def test_a_rotation_returns_when_workers_know_the_key(rig: Rig) -> None:
    rig.keys.read(None)
    rotating = asyncio.create_task(rig.writes.rotate())
    done, _ = await asyncio.wait([rotating], timeout=0.1)
    assert not done
    running = asyncio.create_task(rig.keys.run(cast("RecordApplier", rig.records.applier)))
    rotated = await rotating
    assert (rotated.kid, rotated.file) == (rig.keys.keys[0].kid, str(rig.directory / "keys"))
    assert rotated.applied
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
