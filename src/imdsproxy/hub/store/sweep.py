"""Garbage collection in etcd: user data that no instance has had for an hour, and old removals.

A host that was away for longer than `REMOVED_S` keeps instances that were removed meanwhile, and reports them: etcd no
longer records their removal.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Final

import structlog

from imdsproxy.errors import EtcdUnavailable, SourceRefused
from imdsproxy.fleet import layout
from imdsproxy.host.clock import Clock
from imdsproxy.hub.store.etcd import Committed, Compacted, Etcd
from imdsproxy.hub.store.etcd_messages import prefix_end, unchanged
from imdsproxy.hub.store.state import FleetState

UNUSED_S: Final = 3600.0
REMOVED_S: Final = 30 * 86_400.0
_EVERY_S: Final = 600.0
_AT_ONCE: Final = 1000

_log = structlog.get_logger()


@dataclass(slots=True)
class Sweep:
    """Sweeper of unused user data and old removals.

    Args:
        etcd: The store.
        state: This hub's copy of etcd.
        clock: Monotonic and Unix time.
    """

    etcd: Etcd
    state: FleetState
    clock: Clock
    _unused: dict[str, float] = field(default_factory=dict)

    async def run(self) -> None:
        """Sweep regularly until cancelled."""
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
        """Delete the keys of records that were removed long ago."""
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
