"""What guests of a fleet were answered while everything was broken around them, and what of it may not be. Pure."""

from __future__ import annotations

import contextlib
import itertools
import re
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

_UNREACHABLE: Final = "No route to host"
_LOOKS_S: Final = 3.0
"""So long a guest's kernel looks for a MAC: then it gives up all that waits for it, what has just begun too."""

_NAME: Final = re.compile(r"(i\d+)-v(\d+)")


class Outcome(StrEnum):
    """What an operator was answered to a write."""

    APPLIED = "in force on all its hosts"
    STORED = "stored, not in force everywhere yet"
    UNKNOWN = "no answer: written or not"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Write:
    """One version of an instance; times are of one monotonic clock.

    Attributes:
        hosts: Where this version places it; none removes it.
    """

    instance: str
    version: int
    hosts: frozenset[str]
    sent: float
    done: float
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Answer:
    """What the guest that `instance` names was answered on a host.

    Attributes:
        status: `None` where there was no answer.
        text: The host name that it got, which is `INSTANCE-vVERSION`; without an answer, what happened instead.
    """

    host: str
    instance: str
    begun: float
    ended: float
    status: int | None
    text: str = ""


@dataclass(slots=True)
class History:
    """All that happened.

    Attributes:
        outages: From when to when a host was not there at all.
        resets: From when to when an operator accepted a restored backup: from then on older versions are right.
    """

    writes: list[Write] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    resets: list[tuple[float, float]] = field(default_factory=list)
    outages: list[tuple[str, float, float]] = field(default_factory=list)

    @contextlib.contextmanager
    def outage(self, host: str) -> Iterator[None]:
        """A host is not there, or starts, during the block."""
        begun = time.monotonic()
        self.outages.append((host, begun, float("inf")))
        yield
        self.outages[-1] = host, begun, time.monotonic()

    def counts(self) -> Counter[str]:
        """How many answers of each status there were, and writes of each outcome."""
        found = Counter(f"answered {one.status or 'nothing'}" for one in self.answers)
        found.update(f"written: {one.outcome}" for one in self.writes)
        return found

    def unserved(self) -> list[Answer]:
        """Where a guest was not answered what is certainly in force, though its host was there."""
        writes = self._by_instance()
        return [
            answer
            for answer in self.answers
            if answer.status not in {200, 404}
            and not self._is_out(answer)
            and (known := _certain(answer, writes[answer.instance], self._reset_before(answer)))
            and not (_UNREACHABLE in answer.text and answer.begun - known.done < _LOOKS_S)
        ]

    def _by_instance(self) -> dict[str, list[Write]]:
        """Each one's writes, by version, which is the order in which they were sent."""
        found: dict[str, list[Write]] = {}
        for write in self.writes:
            found.setdefault(write.instance, []).append(write)
        return found

    def _is_out(self, answer: Answer) -> bool:
        return any(
            host == answer.host and begun <= answer.ended and answer.begun <= ended
            for host, begun, ended in self.outages
        )

    def _reset_before(self, answer: Answer) -> float:
        """When the last reset was over that began before an answer ended; 0 where none did."""
        return max((end for begin, end in self.resets if begin <= answer.ended), default=0.0)

    def violations(self) -> Iterator[str]:
        """Every answer that no guest may get, in words."""
        by_instance = self._by_instance()
        newest: dict[tuple[str, str], tuple[int, float]] = {}
        for answer in sorted(self.answers, key=lambda one: one.begun):
            writes = by_instance.get(answer.instance, [])
            since = self._reset_before(answer)
            where = answer.host, answer.instance
            version, seen = newest.get(where, (0, 0.0))
            floor = version if seen > since else 0
            if answer.status == 404:
                if (known := _certain(answer, writes, since)) is not None:
                    yield f"{answer}: 404 for what is in force since version {known.version}"
            elif answer.status == 200:
                found = _NAME.fullmatch(answer.text)
                if found is None or found[1] != answer.instance:
                    yield f"{answer}: another instance's document"
                    continue
                got = int(found[2])
                yield from _judge(answer, got, floor, writes, since)
                newest[where] = max(floor, got), answer.begun


def _judge(
    answer: Answer, got: int, floor: int, writes: Sequence[Write], since: float
) -> Iterator[str]:
    this = next(iter(writes[got - 1 : got]), None) if got else None
    if this is None or not _may_count(this) or this.sent > answer.ended:
        yield f"{answer}: a version that was never committed"
    elif answer.host not in this.hosts:
        yield f"{answer}: a version that was never placed on this host"
    if got < floor:
        yield f"{answer}: older than version {floor}, which this host answered before"
    in_force = (
        one
        for one in itertools.takewhile(lambda one: one.sent <= answer.begun, writes[got:])
        if one.outcome is Outcome.APPLIED
        and since < one.sent
        and one.done <= answer.begun
        and answer.host in one.hosts
    )
    newest = max((one.version for one in in_force), default=0)
    if got < newest:
        yield f"{answer}: older than version {newest}, which was acknowledged"


def _may_count(write: Write) -> bool:
    return write.outcome is not Outcome.REFUSED


def _certain(answer: Answer, writes: Sequence[Write], since: float) -> Write | None:
    """The write by which an instance is certainly served on a host while this was answered."""
    sent = bisect_right(writes, answer.ended, key=lambda one: one.sent)
    # What etcd had before a restore is not known here: only later writes count.
    for number in range(sent - 1, -1, -1):
        write = writes[number]
        if write.sent < since:
            return None
        if write.outcome is Outcome.APPLIED and write.done <= answer.begun:
            return write if answer.host in write.hosts else None
        if _may_count(write) and answer.host not in write.hosts:
            return None
    return None
