"""Upkeep of etcd: the record of each hub, and the removal of unused user data and old removals.

A key with a lease shows that a hub runs (`layout.HUBS`). The record of a hub has no lease, so that it outlives the hub:
status shows a lost hub as absent. A host that was away for longer than `REMOVED_S` keeps instances that were removed
meanwhile, and reports them: etcd no longer records their removal.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import structlog

from imdsproxy.errors import EtcdUnavailable, SourceRefused
from imdsproxy.fleet import layout
from imdsproxy.fleet.layout import KnownHub, operator_key, parse_known_hub, render_known_hub
from imdsproxy.host.clock import Clock
from imdsproxy.hub.store.etcd import Etcd
from imdsproxy.hub.store.etcd_messages import (
    Committed,
    Compacted,
    Compare,
    absent,
    prefix_end,
    unchanged,
)
from imdsproxy.hub.store.state import FleetState

_log: Final = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class HubRecord:
    key: str
    record: KnownHub
    compares: tuple[Compare, ...] = ()


def known_hub(state: FleetState, name: str) -> KnownHub | None:
    """Return the record of a hub; `None` for a name that no hub has had."""
    found = state.value(layout.KNOWN_HUBS + name)
    return None if found is None else parse_known_hub(found[0])


def absent_hubs(state: FleetState) -> dict[str, KnownHub]:
    """Return the hubs that do not run and were not revoked, by name."""
    names = sorted(key.removeprefix(layout.KNOWN_HUBS) for key in state.keys(layout.KNOWN_HUBS))
    found = {
        name: known_hub(state, name)
        for name in names
        if state.stored(layout.HUBS + name) is None and state.stored(operator_key(name)) is None
    }
    return {name: record for name, record in found.items() if record is not None}


def plan_hub_records(state: FleetState, name: str, url: str, now: float) -> Iterator[HubRecord]:
    own = KnownHub(url)
    if known_hub(state, name) != own or layout.KNOWN_HUBS + name in state.unreadable:
        yield HubRecord(layout.KNOWN_HUBS + name, own)
    for other, record in absent_hubs(state).items():
        key, stored = layout.KNOWN_HUBS + other, state.stored(layout.KNOWN_HUBS + other)
        if other != name and record.absent_since is None and stored is not None:
            # Another hub may write the absence as well, and the absent hub may come back.
            compares = unchanged(key, stored[1]), absent(layout.HUBS + other)
            yield HubRecord(key, KnownHub(record.url, int(now)), compares)


async def keep_hub_records(
    etcd: Etcd, state: FleetState, name: str, url: str, clock: Clock
) -> None:
    """Write the records of `plan_hub_records`; raise `EtcdUnavailable`."""
    for one in tuple(plan_hub_records(state, name, url, clock.now().timestamp())):
        await etcd.commit(one.compares, {one.key: render_known_hub(one.record)})
        _log.info("hub noted", key=one.key, absent=one.record.absent_since is not None)


def list_hubs(
    state: FleetState, name: str, urls: Mapping[str, str], answering: frozenset[str]
) -> list[dict[str, Any]]:
    hubs: list[dict[str, Any]] = [{"name": name, "url": None, "answers": True, "absent": False}]
    hubs += (
        {"name": one, "url": url, "answers": one in answering, "absent": False}
        for one, url in sorted(urls.items())
    )
    hubs += (
        {"name": one, "url": record.url, "answers": False, "absent": True}
        for one, record in absent_hubs(state).items()
        if one != name
    )
    since = {one: record.absent_since for one, record in absent_hubs(state).items()}
    return [{**one, "absent_since": since.get(one["name"])} for one in hubs]


UNUSED_S: Final = 3600.0
REMOVED_S: Final = 30 * 86_400.0
_EVERY_S: Final = 600.0
_AT_ONCE: Final = 1000


@dataclass(slots=True)
class Sweep:
    etcd: Etcd
    state: FleetState
    clock: Clock
    _unused: dict[str, float] = field(default_factory=dict)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(_EVERY_S)
            if self.state.value(layout.SUSPECT) is not None:
                # After a restore, user data may seem unused because its records are missing.
                continue
            try:
                await self.look()
                await self.forget_removals()
            except (EtcdUnavailable, SourceRefused, Compacted) as error:
                _log.warning("etcd not swept", reason=str(error))

    async def look(self) -> None:
        """Remove user data that has been unused for `UNUSED_S`.

        A new instance with the same user data writes its `blob_use_key`, which makes the removal fail.
        """
        chunks: dict[str, dict[str, int]] = {}
        for one in (await self._keys(layout.BLOBS)).items():
            chunks.setdefault(one[0].removeprefix(layout.BLOBS).partition("/")[0], {}).update([one])
        uses = await self._keys(layout.BLOB_USES)
        used, now = self.state.blobs(), self.clock.monotonic()
        self._unused = {one: self._unused.get(one, now) for one in chunks if one not in used}
        for sha256, since in tuple(self._unused.items()):
            use = layout.blob_use_key(sha256)
            revision = uses.get(use, 0)
            # A record newer than this hub's copy may use the data.
            if now - since < UNUSED_S or revision > self.state.revision:
                continue
            compares = [
                unchanged(use, revision),
                *(unchanged(*one) for one in chunks[sha256].items()),
            ]
            gone = [*chunks[sha256], *([use] if revision else [])]
            if isinstance(await self.etcd.commit(compares, {}, gone), Committed):
                del self._unused[sha256]
                _log.info("user data removed", sha256=sha256)

    async def forget_removals(self) -> None:
        now = self.clock.now().timestamp()
        for number, key in enumerate(sorted(self.state.removed)):
            if number % _AT_ONCE == 0:
                await asyncio.sleep(0)
            found = self.state.value(key)
            removed = None if found is None else layout.removal_time(found[0])
            if found is not None and removed is not None and now - removed > REMOVED_S:
                await self.etcd.commit([unchanged(key, found[1])], {}, [key])
                _log.info("removal forgotten", key=key)

    async def _keys(self, prefix: str) -> dict[str, int]:
        found = await self.etcd.read(prefix, prefix_end(prefix), keys_only=True)
        return {one.key: one.mod_revision for one in found.kvs}
