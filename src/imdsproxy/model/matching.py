"""Search for instances by an operator's text, in pages. Pure."""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from imdsproxy.model.entities import Instance, InstanceId

MOST: Final = 500
"""Maximum instances of a page."""

_OF_ADDRESSES: Final = re.compile(r"[0-9a-f:.]+")


@dataclass(frozen=True, slots=True)
class Page:
    """Ids of one page, in order; `next` is the last of them if more ids follow."""

    ids: Sequence[InstanceId]
    next: InstanceId | None


def cut_page(found: Sequence[InstanceId], after: str | None, limit: int) -> Page:
    """Return the page after an id, which may no longer exist."""
    begin = 0 if after is None else bisect_right(found, after)
    ids = found[begin : begin + limit]
    return Page(ids, ids[-1] if len(found) > begin + limit else None)


def matcher(text: str, project: str | None = None) -> Callable[[Instance], bool] | None:
    """Return a predicate for instances that match; `None` if every instance matches.

    Each word of the text must occur in an id, name, host name, project, MAC, address or tag, in any case.
    """
    words = text.lower().split()
    # Formatting addresses is most of the work.
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
