"""Members of etcd: the client asks the same member while it answers, then the next in a random order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Final

from imdsproxy.host.clock import Clock
from imdsproxy.reconcile.progress import Backoff

_FIRST_S: Final = 0.05
_LONGEST_S: Final = 2.0


@dataclass(slots=True)
class _Member:
    url: str
    backoff: Backoff = field(default_factory=lambda: Backoff(_FIRST_S, _LONGEST_S))
    rests_until: float = 0.0
    failure: str = ""
    answers: bool = True


START_MEMBERS: Final = (
    "start the other members: etcd needs more than half; `etcdctl endpoint status --cluster`"
)


def spell_outage(answering: int, of: int) -> str:
    """Describe an etcd without a leader of which some members answer."""
    what = "no leader" if answering > of // 2 else "no quorum"
    return f"{what}: {answering} of {of} members answer"


class Members:
    """Members of etcd by the URLs of their JSON gateways, `https://HOST:PORT`.

    Order and pauses are random: hubs that lose a member must not all choose the same next member.
    """

    def __init__(self, urls: Sequence[str], *, random: Random, clock: Clock) -> None:
        self._members = [_Member(url.rstrip("/")) for url in urls]
        random.shuffle(self._members)
        self._random, self._clock = random, clock

    @property
    def urls(self) -> tuple[str, ...]:
        return tuple(one.url for one in self._members)

    @property
    def failures(self) -> str:
        return "; ".join(f"{one.url}: {one.failure}" for one in self._members if one.failure)

    @property
    def lost_quorum(self) -> str | None:
        """Description of a lost quorum, if all members fail and at least one answers; otherwise `None`."""
        answering = [one for one in self._members if one.answers]
        if not answering or not all(one.failure for one in answering):
            return None
        return spell_outage(len(answering), len(self._members))

    def choose(self) -> tuple[str, float]:
        """Return the member to ask, and the pause before, in seconds; the member stays the same while it answers."""
        now = self._clock.monotonic()
        # `min` takes the first of equal members, and failed members move to the end.
        best = min(self._members, key=lambda one: max(one.rests_until, now))
        return best.url, max(0.0, best.rests_until - now)

    def fail(self, url: str, reason: str, *, answers: bool = False) -> None:
        """Let a failed member rest, for longer each time, so that others come first.

        With `answers`, the member answers, but knows no leader.
        """
        member = self._find(url)
        # If the others fail as well, this member is asked again after its pause.
        self._members.remove(member)
        self._members.append(member)
        member.failure, member.answers = reason, answers
        pause = member.backoff.fail() * self._random.uniform(0.5, 1.0)
        member.rests_until = self._clock.monotonic() + pause

    def succeed(self, url: str) -> None:
        member = self._find(url)
        member.backoff.succeed()
        member.rests_until, member.failure, member.answers = 0.0, "", True

    def _find(self, url: str) -> _Member:
        return next(one for one in self._members if one.url == url)
