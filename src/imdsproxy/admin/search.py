"""Instances that match what an operator types."""

import asyncio
from collections.abc import Sequence
from typing import Final

from imdsproxy.admin.records import find_record, list_ids
from imdsproxy.core.inventory import Inventory
from imdsproxy.core.matching import matcher
from imdsproxy.core.model import InstanceId, NetworkId

_AT_ONCE: Final = 50
"""Records that are looked at before the event loop, which has guests waiting, does other work: 2 ms."""


async def find_instances(
    inventory: Inventory, text: str, network: NetworkId | None
) -> Sequence[InstanceId]:
    """The ids of all that match, in order.

    Args:
        inventory: Where to look.
        text: Words that each must be in an id, name, host name, project, MAC, address or tag, in any case.
        network: Only instances with a port in it.
    """
    every, matches = list_ids(inventory, network), matcher(text)
    if matches is None:
        return every
    found: list[InstanceId] = []
    for number, one in enumerate(every):
        if number % _AT_ONCE == _AT_ONCE - 1:
            await asyncio.sleep(0)
        record = find_record(inventory, one)
        if record is not None and matches(record):
            found.append(one)
    return found
