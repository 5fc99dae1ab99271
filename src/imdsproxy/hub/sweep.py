"""User data in etcd that no instance has any more is removed after an hour."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Final

import structlog

from imdsproxy.core.fleet import layout
from imdsproxy.errors import EtcdUnavailable
from imdsproxy.host.clock import Clock
from imdsproxy.hub.etcd import Committed, Etcd
from imdsproxy.hub.etcd_messages import prefix_end, unchanged
from imdsproxy.hub.state import FleetState

UNUSED_S: Final = 3600.0
_EVERY_S: Final = 600.0

_log = structlog.get_logger()


@dataclass(slots=True)
class Sweep:
    """Removes user data.

    Args:
        etcd: The store.
        state: This hub's copy of it.
        clock: Monotonic.
    """

    etcd: Etcd
    state: FleetState
    clock: Clock
    _unused: dict[str, float] = field(default_factory=dict)

    async def run(self) -> None:
        """Look now and then, until cancelled."""
        while True:
            await asyncio.sleep(_EVERY_S)
            try:
                await self.look()
            except EtcdUnavailable as error:
                _log.warning("user data not swept", reason=error.message)

    async def look(self) -> None:
        """Remove what has had no use for long enough.

        An instance that begins to have it meanwhile writes its `blob_use_key`: then it stays.
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
            # A record that is newer than this hub's copy may have it.
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

    async def _keys(self, prefix: str) -> dict[str, int]:
        found = await self.etcd.read(prefix, prefix_end(prefix), keys_only=True)
        return {one.key: one.mod_revision for one in found.kvs}
