"""Which member of etcd is asked: one that answers, the next one in a random order when it fails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Final

from imdsproxy.core.timing import Backoff
from imdsproxy.host.clock import Clock

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
    """Say that etcd has no leader, though some members answer."""
    what = "no leader" if answering > of // 2 else "no quorum"
    return f"{what}: {answering} of {of} members answer"


class Members:
    """The members, as far as this client knows them.

    Args:
        urls: Of their JSON gateways, `https://HOST:PORT`.
        random: Where hubs begin, and how long they wait: hubs that lose a member must not all go to the same next one.
    """

    def __init__(self, urls: Sequence[str], *, random: Random, clock: Clock) -> None:
        self._members = [_Member(url.rstrip("/")) for url in urls]
        random.shuffle(self._members)
        self._random, self._clock = random, clock

    @property
    def urls(self) -> tuple[str, ...]:
        """All of them."""
        return tuple(one.url for one in self._members)

    @property
    def failures(self) -> str:
        """What was last wrong with each that fails, in words."""
        return "; ".join(f"{one.url}: {one.failure}" for one in self._members if one.failure)

    @property
    def lost_quorum(self) -> str | None:
        """Why no member can answer, where one says that it knows no leader; `None` where one may, or none answers."""
        answering = [one for one in self._members if one.answers]
        if not answering or not all(one.failure for one in answering):
            return None
        return spell_outage(len(answering), len(self._members))

    def choose(self) -> tuple[str, float]:
        """The member to ask, and in how many seconds: the one before while it answers."""
        now = self._clock.monotonic()
        # `min` takes the first of equal ones, and those that failed go to the end.
        best = min(self._members, key=lambda one: max(one.rests_until, now))
        return best.url, max(0.0, best.rests_until - now)

    def fail(self, url: str, reason: str, *, answers: bool = False) -> None:
        """Let a member rest that has not answered as it should, for longer each time: others come first.

        Args:
            url: Of the member.
            reason: In words.
            answers: The member says that it knows no leader.
        """
        member = self._find(url)
        # Where others fail as well, it is asked again after its pause.
        self._members.remove(member)
        self._members.append(member)
        member.failure, member.answers = reason, answers
        pause = member.backoff.fail() * self._random.uniform(0.5, 1.0)
        member.rests_until = self._clock.monotonic() + pause

    def succeed(self, url: str) -> None:
        """It has answered."""
        member = self._find(url)
        member.backoff.succeed()
        member.rests_until, member.failure, member.answers = 0.0, "", True

    def _find(self, url: str) -> _Member:
        return next(one for one in self._members if one.url == url)
