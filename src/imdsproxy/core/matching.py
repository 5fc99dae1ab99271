"""Which instances match what an operator types, and a page of those that do. Pure."""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from imdsproxy.core.model import Instance, InstanceId

MOST: Final = 500
"""Instances of a page."""

_OF_ADDRESSES: Final = re.compile(r"[0-9a-f:.]+")


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


def matcher(text: str, project: str | None = None) -> Callable[[Instance], bool] | None:
    """Whether an instance matches; `None` where each does.

    Args:
        text: Words that each must be in an id, name, host name, project, MAC, address or tag, in any case.
        project: The only one whose instances match.
    """
    words = text.lower().split()
    # To spell addresses is most of the work.
    spelled = any(map(_OF_ADDRESSES.fullmatch, words))

    def matches(record: Instance) -> bool:
        if project is not None and record.project != project:
            return False
        shown = "\n".join(_parts(record, spelled=spelled)).lower()
        return all(word in shown for word in words)

    return matches if words or project is not None else None


def _parts(record: Instance, *, spelled: bool) -> Iterator[str]:
    yield from (record.id, record.name, record.hostname, record.project or "")
    yield from map("=".join, record.tags)
    for port in record.ports if spelled else ():
        yield port.mac or ""
        yield from map(str, port.addresses)
