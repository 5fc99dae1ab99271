"""Keeps up with all keys below a prefix: a snapshot, then each change, whichever members come and go."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Final

from imdsproxy.core.timing import Backoff
from imdsproxy.errors import EtcdUnavailable, SourceRefused
from imdsproxy.hub.etcd import Changes, Compacted, Etcd, Snapshot
from imdsproxy.hub.etcd_messages import prefix_end

_FIRST_S: Final = 0.05
_LONGEST_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Outage:
    """No changes are received, and it is tried again. What was received before stays true of its revision."""

    error: EtcdUnavailable | SourceRefused


async def mirror(etcd: Etcd, prefix: str) -> AsyncGenerator[Snapshot | Changes | Outage, None]:
    """All keys below a prefix, then what changes; no change is missing between two of what it gives.

    A snapshot comes first, and again where etcd no more has the changes since: it takes the place of all before.
    After `Etcd.accept_older` begin a new one.
    """
    revision = 0
    backoff = Backoff(_FIRST_S, _LONGEST_S)
    while True:
        try:
            if not revision:
                snapshot = await etcd.read(prefix, prefix_end(prefix))
                revision = snapshot.revision
                yield snapshot
            async with contextlib.aclosing(etcd.follow(prefix, revision + 1)) as follow:
                async for changes in follow:
                    backoff.succeed()
                    revision = changes.revision
                    yield changes
        except Compacted:
            revision = 0
        except (EtcdUnavailable, SourceRefused) as error:
            yield Outage(error)
            await asyncio.sleep(backoff.fail())
