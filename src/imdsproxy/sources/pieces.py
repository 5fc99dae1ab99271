"""Publish many instances a few at a time, so that the event loop answers others in between."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from imdsproxy.core.observation import Observation
    from imdsproxy.core.packed import PackedInstances
    from imdsproxy.sources.api import Publish

__all__ = ["publish_in_pieces"]

_PIECE: Final = 200


async def publish_in_pieces(
    publish: Publish, observation: Observation, instances: PackedInstances
) -> None:
    """Publish an observation; the last piece says the whole of it.

    Args:
        publish: Takes each piece.
        observation: All but the instances. No address in it moves from one instance to another.
        instances: Its instances.
    """
    if len(instances) > _PIECE:
        first = replace(
            observation,
            full=False,
            in_sync=observation.in_sync and not observation.full,
            networks_removed=(),
            instances_removed=(),
            more=True,
        )
        publish(first)
        piece = replace(first, networks={})
        keys = iter(instances)
        while part := tuple(islice(keys, _PIECE)):
            publish(replace(piece, instances=instances.part(part)))
            await asyncio.sleep(0)
    publish(replace(observation, instances=instances))
