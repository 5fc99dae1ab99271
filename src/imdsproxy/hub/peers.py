"""The other hubs of a fleet, asked over their TLS port with this hub's certificate."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

import httpcore
import structlog

from imdsproxy.core.fleet import layout
from imdsproxy.core.fleet.stream import CONNECT_S
from imdsproxy.host.clock import Clock
from imdsproxy.hub.gateway import open_tls
from imdsproxy.hub.state import FleetState

_RENEWED_S: Final = 3600.0

_log = structlog.get_logger()


@dataclass(slots=True)
class Peers:
    """The hubs that are there beside this one.

    Args:
        state: Where hubs say that they are there.
        name: This hub's.
        clock: Monotonic.
        files: This hub's certificate with its key, and the CA certificate; `None` where hubs speak without TLS.
    """

    state: FleetState
    name: str
    clock: Clock
    files: tuple[Path, Path] | None = None
    _pool: httpcore.AsyncConnectionPool | None = None
    _opened: float = 0.0

    def urls(self) -> dict[str, str]:
        """Each hub's URL, by its name."""
        found: dict[str, str] = {}
        for key in self.state.keys(layout.HUBS):
            name, value = key.removeprefix(layout.HUBS), self.state.value(key)
            if name != self.name and value is not None:
                found[name] = str(layout.decode(value[0]).get("url", ""))
        return found

    async def ask_all(
        self, path: str, query: Mapping[str, str], timeout_s: float, body: object = None
    ) -> dict[str, Any]:
        """What each other hub answers to a GET, or to a POST of a body; those that do not answer are missing."""
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
    ) -> Any:  # noqa: ANN401 - JSON
        """What one answers, decoded; `None` where it does not answer, or refuses."""
        pool = self._connections()
        limits = {"connect": CONNECT_S, "write": timeout_s, "pool": timeout_s, "read": timeout_s}
        try:
            answer = await pool.request(
                "GET" if body is None else "POST",
                f"{url}{path}?{urlencode(query)}",
                headers={} if body is None else {"content-type": "application/json"},
                content=None if body is None else json.dumps(body).encode(),
                extensions={"timeout": limits},
            )
            return json.loads(answer.content) if answer.status == 200 else None  # noqa: PLR2004 - HTTP
        except (
            httpcore.TimeoutException,
            httpcore.NetworkError,
            httpcore.ProtocolError,
            ValueError,
            OSError,
        ) as error:
            _log.warning("hub does not answer", url=url, reason=str(error) or type(error).__name__)
            return None

    def _connections(self) -> httpcore.AsyncConnectionPool:
        """Connections that show this hub's certificate as it is now, which is renewed now and then."""
        now = self.clock.monotonic()
        if self._pool is None or now - self._opened > _RENEWED_S:
            tls = None if self.files is None else open_tls(self.files[1], self.files[0])
            self._pool = httpcore.AsyncConnectionPool(ssl_context=tls, keepalive_expiry=30.0)
            self._opened = now
        return self._pool
