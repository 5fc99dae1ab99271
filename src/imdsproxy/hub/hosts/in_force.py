"""Changes in force on hosts, whichever hub each host is connected to: the other hubs, and waits for all of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias
from urllib.parse import urlencode

import httpcore
import structlog

from imdsproxy.fleet import layout
from imdsproxy.fleet.layout import HostId, parse_hub
from imdsproxy.fleet.stream import ALIVE_PATH, CONNECT_S, ItemKey
from imdsproxy.host.clock import Clock
from imdsproxy.host.http import Unanswered, ask
from imdsproxy.hub.hosts.streams import Streams
from imdsproxy.hub.store.etcd import open_tls
from imdsproxy.hub.store.state import FleetState
from imdsproxy.issuer.exchange import CLOCKS_S

_RENEWED_S: Final = 3600.0
_REST_S: Final = 5.0
"""Time for which to skip a hub that did not answer: a hub that hangs must not cost each command two seconds."""

_FRESH_S: Final = 1.0
"""Maximum age of an answer that shows that a hub does not hang."""

_log = structlog.get_logger()


@dataclass(slots=True)
class Peers:
    """Other running hubs.

    `files` are this hub's certificate with its key, and the CA certificate; `None` for connections without TLS.
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

    async def doubt_clock(self) -> str | None:
        """Return the reason why this hub's clock may be wrong; `None` if a running hub agrees, or no other hub runs."""
        alive = await self.ask_alive()
        if wrong := self.compare_clocks(alive):
            hubs = ", ".join(f"{hub} by {ahead_s:+.0f} s" for hub, ahead_s in sorted(wrong.items()))
            return f"the clocks of other hubs differ from this hub's: {hubs}"
        return "no other hub answers with its clock" if self.urls() and not alive else None

    async def ask_alive(self) -> dict[str, Any]:
        """Ask all other hubs whether they run; return the answers of hubs that answer."""
        return await self.ask_all(ALIVE_PATH, {}, CONNECT_S)

    def compare_clocks(self, alive: Mapping[str, Any]) -> dict[str, float]:
        """Return the seconds by which other hubs' clocks are ahead of this hub's, for differences above `CLOCKS_S`.

        Args:
            alive: Answers of `ask_alive`.
        """
        now, found = self.clock.now().timestamp(), dict[str, float]()
        for name, answer in alive.items():
            match answer.get("now"):
                case int() | float() as theirs if abs(theirs - now) > CLOCKS_S:
                    found[name] = theirs - now
                case _:
                    pass
        return found

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


APPLIED_PATH: Final = "/fleet/applied"
WAIT_S: Final = 10.0
_ABSENT_S: Final = 3.0
"""Time to wait for hosts without a hub: such a host may be about to connect to another hub."""

_AGAIN_S: Final = 0.1
_ROUND_S: Final = 1.0
"""Time until the next search for hosts, since a host may have moved to another hub."""

NOT_CONNECTED: Final = "not connected"
COMING: Final = frozenset((NOT_CONNECTED, "not received", "not sent yet", "not acknowledged yet"))
"""Transient reasons. All other reasons are failures on a host, in the host's words."""

Reported: TypeAlias = Mapping[HostId, Mapping[str, Any]]
"""Acknowledged revision, failed items and hub's name of each host; hosts without a connection are missing."""


@dataclass(slots=True)
class InForce:
    """Acknowledgements of all hosts of the fleet, connected to this hub or to others.

    Args:
        expect: Called with a revision that a client waits for and that this hub has not received.
    """

    streams: Streams
    peers: Peers
    expect: Callable[[int], object] = lambda _: None

    async def wait(
        self,
        hosts: Collection[HostId],
        revision: int,
        items: Collection[ItemKey] | None = None,
        timeout_s: float = WAIT_S,
    ) -> dict[HostId, str]:
        """Wait until a revision is in force on these hosts; return the pending hosts with reasons, sorted by name.

        Only failures of `items` count; `None` stands for all.
        """
        loop = asyncio.get_running_loop()
        begun, pending = loop.time(), dict.fromkeys(sorted(hosts), NOT_CONNECTED)
        while pending:
            left = begun + timeout_s - loop.time()
            part = max(0.0, min(left, _ROUND_S))
            here = await self._round(frozenset(pending), revision, items, part)
            pending = {one: why for one in pending if (why := here.get(one, NOT_CONNECTED))}
            if not pending:
                break
            passed = loop.time() - begun
            absent = all(why == NOT_CONNECTED for why in pending.values())
            failed = all(why not in COMING for why in pending.values())
            if failed or passed >= (min(_ABSENT_S, timeout_s) if absent else timeout_s):
                break
            await asyncio.sleep(_AGAIN_S)
        return pending

    async def _round(
        self,
        hosts: frozenset[HostId],
        revision: int,
        items: Collection[ItemKey] | None,
        timeout_s: float,
    ) -> dict[HostId, str]:
        """Ask all hubs; return a reason for each connected host, empty if the revision is in force."""
        elsewhere = hosts - self.streams.hosts.keys()
        mine = self.here(hosts, revision, items, timeout_s)
        if not (elsewhere and self.peers.urls()):
            return await mine
        # A body, since a URL with the names of thousands of hosts would be refused.
        body = {
            "revision": revision,
            "hosts": sorted(elsewhere),
            "items": None if items is None else sorted(items),
            "within_s": timeout_s,
            "incarnation": self.streams.state.meta.incarnation,
        }
        asking = self.peers.ask_all(APPLIED_PATH, {}, timeout_s + CONNECT_S, body)
        theirs = asyncio.ensure_future(asking)
        found = await mine
        for answer in (await theirs).values():
            found |= {HostId(host): str(why) for host, why in answer.items()}
        return found

    async def here(
        self,
        hosts: Collection[HostId],
        revision: int,
        items: Collection[ItemKey] | None,
        timeout_s: float,
        incarnation: int = 0,
    ) -> dict[HostId, str]:
        """Wait for hosts of this hub; return a reason for each, empty if the revision is in force.

        Hosts that are not connected to this hub are missing. If this hub lags behind `incarnation`, all of its hosts
        are pending: revisions of an older incarnation prove nothing.
        """
        if self.streams.state.revision < revision:
            self.expect(revision)
        mine = [one for one in hosts if one in self.streams.hosts]
        if self.streams.state.meta.incarnation < incarnation:
            return dict.fromkeys(mine, "not received")
        pending = await self.streams.wait(mine, revision, timeout_s, items)
        return {host: pending.get(host, "") for host in mine}

    def report(self) -> dict[HostId, dict[str, Any]]:
        return {
            host: {
                "acknowledged": one.acked,
                "failed": dict(one.failed),
                "serial": one.serial,
                "level": one.level,
            }
            for host, one in self.streams.hosts.items()
        }

    async def levels(self) -> Mapping[HostId, int]:
        """Return the level of records that each connected host reads; 1 if another hub does not report it."""
        reported = await self.report_all()
        levels = {host: one.get("level", 1) for host, one in reported.items()}
        return {host: one if isinstance(one, int) else 1 for host, one in levels.items()}

    async def report_all(self) -> Reported:
        return (await self.ask_hubs())[0]

    async def ask_hubs(self) -> tuple[Reported, Collection[str]]:
        """Return the reports of all hubs, and the names of the other hubs that answered."""
        answers = await self.peers.ask_all(APPLIED_PATH, {}, CONNECT_S)
        found = {host: {**one, "hub": self.peers.name} for host, one in self.report().items()}
        for name, answer in answers.items():
            for host, one in _parse_report(answer).items():
                known = found.get(host)
                if known is None or one["acknowledged"] > known["acknowledged"]:
                    found[host] = {**one, "hub": name}
        return found, answers.keys()


def _parse_report(answer: Mapping[str, Any]) -> dict[HostId, dict[str, Any]]:
    """Parse another hub's `InForce.report`; skip hosts that this version cannot parse."""
    found: dict[HostId, dict[str, Any]] = {}
    for host, one in answer.items():
        match one:
            case {"acknowledged": int(acknowledged), "failed": dict(failed)}:
                words = {str(item): str(why) for item, why in failed.items()}
                found[HostId(host)] = {**one, "acknowledged": acknowledged, "failed": words}
            case _:
                pass
    return found
