"""Whether a change is in force on its hosts, whichever hub each is connected to."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from imdsproxy.core.fleet.layout import HostId
from imdsproxy.core.fleet.stream import CONNECT_S, ItemKey
from imdsproxy.hub.peers import Peers
from imdsproxy.hub.streams import Streams

APPLIED_PATH: Final = "/fleet/applied"
WAIT_S: Final = 10.0
_ABSENT_S: Final = 3.0
"""A host that is connected to no hub may be on its way to another one."""

_AGAIN_S: Final = 0.1
_ROUND_S: Final = 1.0
"""Then hosts are looked for anew: one may have gone to another hub."""

NOT_CONNECTED: Final = "not connected"
COMING: Final = frozenset((NOT_CONNECTED, "not received", "not sent yet", "not acknowledged yet"))
"""What may pass by itself; the rest are failures on a host, in its words."""

Reported: TypeAlias = Mapping[HostId, Mapping[str, Any]]
"""By host what it has acknowledged, what failed there, and the name of its hub; those that are connected to none are
missing."""


@dataclass(slots=True)
class InForce:
    """Waits for acknowledgements.

    Args:
        streams: The hosts of this hub.
        peers: The other hubs.
    """

    streams: Streams
    peers: Peers

    async def wait(
        self,
        hosts: Collection[HostId],
        revision: int,
        items: Collection[ItemKey] | None = None,
        timeout_s: float = WAIT_S,
    ) -> dict[HostId, str]:
        """Wait until a revision is in force on these hosts.

        Args:
            hosts: Which.
            revision: All up to it.
            items: What failed counts only if it is one of these; `None` for all.
            timeout_s: How long at most.

        Returns:
            Those on which it is not yet, and why, in the order of their names.
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
        """What each hub says of those of the hosts that are connected to it; empty where it is in force."""
        elsewhere = hosts - self.streams.hosts.keys()
        mine = self.here(hosts, revision, items, timeout_s)
        if not (elsewhere and self.peers.urls()):
            return await mine
        # In a body: a URL with the names of thousands of hosts is refused.
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
        """The same of this hub, where it is as far as the fleet's incarnation: revisions of an older one say nothing.

        Hosts that are not connected to it are missing.
        """
        mine = [one for one in hosts if one in self.streams.hosts]
        if self.streams.state.meta.incarnation < incarnation:
            return dict.fromkeys(mine, "not received")
        pending = await self.streams.wait(mine, revision, timeout_s, items)
        return {host: pending.get(host, "") for host in mine}

    def report(self) -> dict[HostId, dict[str, Any]]:
        """Each host of this hub: what it has acknowledged, and what failed there."""
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
        """The level of records that each connected host reads; of one that another hub does not say it, the first."""
        reported = await self.report_all()
        levels = {host: one.get("level", 1) for host, one in reported.items()}
        return {host: one if isinstance(one, int) else 1 for host, one in levels.items()}

    async def report_all(self) -> Reported:
        """The same of all hubs; each with the name of its hub."""
        return (await self.ask_hubs())[0]

    async def ask_hubs(self) -> tuple[Reported, Collection[str]]:
        """As `report_all`, and which of the other hubs answered."""
        answers = await self.peers.ask_all(APPLIED_PATH, {}, CONNECT_S)
        found = {host: {**one, "hub": self.peers.name} for host, one in self.report().items()}
        for name, answer in answers.items():
            for host, one in _parse_report(answer).items():
                known = found.get(host)
                if known is None or one["acknowledged"] > known["acknowledged"]:
                    found[host] = {**one, "hub": name}
        return found, answers.keys()


def _parse_report(answer: Mapping[str, Any]) -> dict[HostId, dict[str, Any]]:
    """As `InForce.report` of another hub, which may be of another version: what is none of it is not known."""
    found: dict[HostId, dict[str, Any]] = {}
    for host, one in answer.items():
        match one:
            case {"acknowledged": int(acknowledged), "failed": dict(failed)}:
                words = {str(item): str(why) for item, why in failed.items()}
                found[HostId(host)] = {**one, "acknowledged": acknowledged, "failed": words}
            case _:
                pass
    return found
