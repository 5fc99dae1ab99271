"""Instances that match what an operator types, and a page of them."""

import asyncio
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from imdsproxy.admin.records import find_record, list_ids
from imdsproxy.core.inventory import Inventory
from imdsproxy.core.model import Instance, InstanceId, NetworkId

MOST: Final = 500
"""Instances of a page."""

_OF_ADDRESSES: Final = re.compile(r"[0-9a-f:.]+")
_AT_ONCE: Final = 50
"""Records that are looked at before the event loop, which has guests waiting, does other work: 2 ms."""


@dataclass(frozen=True, slots=True)
class Page:
    """Some ids in their order.

    Attributes:
        next: The last of them, where there are more; else `None`.
    """

    ids: Sequence[InstanceId]
    next: InstanceId | None


def cut_page(found: Sequence[InstanceId], after: str | None, limit: int) -> Page:
    """The page that comes after an id, which need not be there any more."""
    begin = 0 if after is None else bisect_right(found, after)
    ids = found[begin : begin + limit]
    return Page(ids, ids[-1] if len(found) > begin + limit else None)


async def find_instances(
    inventory: Inventory, text: str, network: NetworkId | None
) -> Sequence[InstanceId]:
    """The ids of all that match, in order.

    Args:
        inventory: Where to look.
        text: Words that each must be in an id, name, host name, project, MAC, address or tag, in any case.
        network: Only instances with a port in it.
    """
    every, words = list_ids(inventory, network), text.lower().split()
    if not words:
        return every
    # To spell addresses is most of the work.
    spelled = any(map(_OF_ADDRESSES.fullmatch, words))
    found: list[InstanceId] = []
    for number, one in enumerate(every):
        if number % _AT_ONCE == _AT_ONCE - 1:
            await asyncio.sleep(0)
        record = find_record(inventory, one)
        if record is not None:
            shown = "\n".join(_parts(record, spelled=spelled)).lower()
            if all(word in shown for word in words):
                found.append(one)
    return found


def _parts(record: Instance, *, spelled: bool) -> Iterator[str]:
    yield from (record.id, record.name, record.hostname, record.project or "")
    yield from map("=".join, record.tags)
    for port in record.ports if spelled else ():
        yield port.mac or ""
        yield from map(str, port.addresses)
