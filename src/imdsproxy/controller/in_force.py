"""Functions that wait until published records are in force."""

from __future__ import annotations

import asyncio
from typing import Final

from imdsproxy.controller.record_loop import RecordLoop
from imdsproxy.model.entities import NetworkId
from imdsproxy.network import planned
from imdsproxy.network.listeners.loop import ListenerLoop
from imdsproxy.network.planned import NotServedCode

UNCONFIRMED: Final = "the data plane has not confirmed it yet"
"""Why a change is not in force yet; the reasons that block it follow."""

_APPLY_DEADLINE_S: Final = 10.0
"""Time without progress after which a change is reported as not in force yet, in seconds."""

_LISTENER_DEADLINE_S: Final = 2.0
_POLL_S: Final = 0.05
_COMING: Final = frozenset({NotServedCode.PENDING, NotServedCode.ADDRESS_TENTATIVE})


async def wait_confirmed(records: RecordLoop, listeners: ListenerLoop, *, changed: bool) -> bool:
    """Wait until every HAProxy worker has the published records; false if the work fails or stalls."""
    waits = [records.tickets.wait(records.tickets.given)]
    if changed:
        waits.append(listeners.tickets.wait(listeners.tickets.given))

    async def both() -> None:
        await asyncio.gather(*waits)
        if records.withheld:
            # The first MAC in a network needs another listener, and then the records again.
            await listeners.tickets.wait(listeners.tickets.given)
            await records.tickets.wait(records.tickets.given)

    waiting = asyncio.ensure_future(both())
    before = None
    try:
        while not (await asyncio.wait([waiting], timeout=_APPLY_DEADLINE_S))[0]:
            now = records.looked, listeners.rounds
            failing = listeners.failure is not None or records.failure is not None
            if failing or (now == before and not listeners.working):
                return False
            before = now
    finally:
        waiting.cancel()
    return True


async def find_unserved(
    listeners: ListenerLoop, networks: frozenset[NetworkId]
) -> list[planned.NotServed]:
    """Return why these networks are not served, after a wait for pending ones."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _LISTENER_DEADLINE_S
    while True:
        found = [one for one in listeners.degraded() if one.network in networks]
        if not any(one.code in _COMING for one in found) or loop.time() > deadline:
            return found
        await asyncio.sleep(_POLL_S)
