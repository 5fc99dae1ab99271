"""Client for the other hubs of a fleet, by their TLS port and with this hub's certificate."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

import httpcore
import structlog

from imdsproxy.fleet import layout
from imdsproxy.fleet.stream import ALIVE_PATH, CONNECT_S
from imdsproxy.fleet.values import parse_hub
from imdsproxy.host.clock import Clock
from imdsproxy.host.http import Unanswered, ask
from imdsproxy.hub.store.gateway import open_tls
from imdsproxy.hub.store.state import FleetState

_RENEWED_S: Final = 3600.0
_REST_S: Final = 5.0
"""Time for which to skip a hub that did not answer: a hub that hangs must not cost each command two seconds."""

_FRESH_S: Final = 1.0
"""Maximum age of an answer that shows that a hub does not hang."""

_log = structlog.get_logger()


@dataclass(slots=True)
class Peers:
    """Other running hubs.

    Args:
        state: Copy of etcd with the running hubs.
        name: Name of this hub.
        clock: Monotonic time.
        files: This hub's certificate with its key, and the CA certificate; `None` for connections without TLS.
    """

    state: FleetState
    name: str
    clock: Clock
    files: tuple[Path, Path] | None = None
    _pool: httpcore.AsyncConnectionPool | None = None
    _opened: float = 0.0
    _answered: dict[str, float] = field(default_factory=dict)
    _rests_until: dict[str, float] = field(default_factory=dict)

    def urls(self) -> dict[str, str]:
        """Return the URLs of the other hubs, by name."""
        found: dict[str, str] = {}
        for key in self.state.keys(layout.HUBS):
            name, value = key.removeprefix(layout.HUBS), self.state.value(key)
            if name != self.name and value is not None:
                found[name] = parse_hub(value[0]).url
        return found

    async def ask_all(
        self, path: str, query: Mapping[str, str], timeout_s: float, body: object = None
    ) -> dict[str, Any]:
        """Send a GET, or a POST with a body, to all other hubs; return the answers of hubs that answer."""
        urls = self.urls()
        asked = (self.ask(url, path, query, timeout_s, body) for url in urls.values())
        answers = await asyncio.gather(*asked)
        return {name: one for name, one in zip(urls, answers, strict=True) if one is not None}

    async def ask(
        self,
        url: str,
        path: str,
        query: Mapping[str, str],
        timeout_s: float,
        body: object = None,
    ) -> Any:
        """Return the decoded answer of a hub; `None` if the hub does not answer, or refuses.

        A slow request is sent only to a hub that shows within `CONNECT_S` that it runs.
        """
        now, quick = self.clock.monotonic(), timeout_s <= CONNECT_S
        if now < self._rests_until.get(url, now):
            return None
        if not quick and now - self._answered.get(url, 0.0) > _FRESH_S:
            alive = await self._send(url, ALIVE_PATH, {}, CONNECT_S, None)
            if alive is None:
                return None
        return await self._send(url, path, query, timeout_s, body)

    async def _send(
        self, url: str, path: str, query: Mapping[str, str], timeout_s: float, body: object
    ) -> Any:
        limits = dict.fromkeys(("read", "write", "pool"), timeout_s) | {"connect": CONNECT_S}
        method, raw = ("GET", None) if body is None else ("POST", json.dumps(body).encode())
        target = f"{url}{path}?{urlencode(query)}"
        try:
            status, content = await ask(self._connections(), method, target, limits, body=raw)
            if status != 200:  # noqa: PLR2004 - HTTP's
                return None
            self._answered[url] = self.clock.monotonic()
            found = json.loads(content)
        except (Unanswered, ValueError, OSError) as error:
            _log.warning("hub does not answer", url=url, reason=str(error))
            if timeout_s <= CONNECT_S or not (isinstance(error, Unanswered) and error.silent):
                self._rests_until[url] = self.clock.monotonic() + _REST_S
            return None
        # All answers between hubs are objects.
        return found if isinstance(found, dict) else None

    def _connections(self) -> httpcore.AsyncConnectionPool:
        """Return the connection pool; a new pool each hour uses this hub's renewed certificate."""
        now = self.clock.monotonic()
        if self._pool is None or now - self._opened > _RENEWED_S:
            tls = None if self.files is None else open_tls(self.files[1], self.files[0])
            self._pool = httpcore.AsyncConnectionPool(ssl_context=tls, keepalive_expiry=30.0)
            self._opened = now
        return self._pool
