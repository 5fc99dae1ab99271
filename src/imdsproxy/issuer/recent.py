"""Last answers to guests' requests for identity tokens, by audience, for operators. They hold no token and no nonce."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from typing import Any, Final

from imdsproxy.issuer.claims import Refusal
from imdsproxy.issuer.holder import Held
from imdsproxy.model.subject import Subject

MOST_AUDIENCES: Final = 4
"""Maximum number of audiences of a guest in one network; audiences that its policy does not allow count as one."""

MOST_GUESTS: Final = 4096

GIVEN: Final = "given"
UNASKED: Final = "unasked"
"""Outcome of an audience that the guest has not requested; its token was fetched ahead."""

UNSIGNED: Final = "unsigned"
"""Outcome of a request while nothing signs."""

TOO_MANY: Final = "share"
"""Outcome of a request over the instance's share of signatures; named as in `TokenHolder.refused`."""


@dataclass(frozen=True, slots=True)
class LastAnswer:
    """Last answer for one audience.

    Attributes:
        outcome: `given`, `unasked`, `unsigned`, `share`, or a reason of `claims.Refusal`.
        at: Time of the answer, Unix time; `None` if the guest has not requested the audience.
        token_id: Claim `jti` of the token given; `None` if none was given.
        expires_at: Claim `exp` of the token given.
        ready_id: Claim `jti` of the token that is held for requests without a nonce; `None` if none is held.
        ready_until: Claim `exp` of this token.
    """

    audience: str
    outcome: str
    at: int | None = None
    token_id: str | None = None
    expires_at: int | None = None
    ready_id: str | None = None
    ready_until: int | None = None


def render_answers(answers: Sequence[LastAnswer]) -> dict[str, object]:
    """Return answers as JSON; `parse_answers` reverses it."""
    return {"answers": [asdict(one) for one in answers]}


def parse_answers(data: bytes) -> list[LastAnswer]:
    """Parse the result of `render_answers`; raise `ValueError` if it is none."""
    try:
        answers = [LastAnswer(**one) for one in json.loads(data)["answers"]]
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"no answers to a guest: {error}") from error
    if not all(map(_is_well_formed, answers)):
        raise ValueError("no answers to a guest: a value has another type")
    return answers


def _is_well_formed(answer: LastAnswer) -> bool:
    texts = (answer.audience, answer.outcome, answer.token_id or "", answer.ready_id or "")
    times = (answer.at, answer.expires_at, answer.ready_until)
    return all(isinstance(one, str) for one in texts) and all(
        one is None or type(one) is int for one in times
    )


@dataclass(slots=True)
class RecentAnswers:
    """Last answers of each guest, in bounded memory: the guest with the oldest answer is forgotten first.

    A guest's answers are one JSON text. As objects they would take three times the memory.
    """

    _texts: dict[bytes, bytes] = field(default_factory=dict)

    def note(
        self, subject: Subject, audience: str, found: Held | Refusal | str | None, now: float
    ) -> None:
        """Note an answer: a token, the reason why there is none, or `None` for too many requests."""
        answer = _describe(audience, found, int(now))
        name = _name(subject)
        refused = answer.outcome == Refusal.AUDIENCE
        kept = [
            one
            for one in self._read(name)
            if one.audience != audience and not (refused and one.outcome == Refusal.AUDIENCE)
        ]
        shapes = [
            [one.audience, one.outcome, one.at, one.token_id, one.expires_at]
            for one in [answer, *kept][:MOST_AUDIENCES]
        ]
        self._texts.pop(name, None)
        self._texts[name] = json.dumps(shapes, separators=(",", ":")).encode("ascii")
        if len(self._texts) > MOST_GUESTS:
            del self._texts[next(iter(self._texts))]

    def list_answers(self, subject: Subject, held: Mapping[str, Held]) -> list[LastAnswer]:
        """Return the last answers to a subject's guest, the newest first; then the tokens fetched ahead.

        Args:
            held: Valid tokens of the subject that are held, by audience.
        """
        answers = self._read(_name(subject))
        unasked = [
            LastAnswer(one, UNASKED)
            for one in sorted(held.keys() - {one.audience for one in answers})
        ]
        return [_with_ready(one, held.get(one.audience)) for one in [*answers, *unasked]]

    def _read(self, name: bytes) -> list[LastAnswer]:
        shapes: list[list[Any]] = json.loads(self._texts.get(name, b"[]"))
        return [LastAnswer(*one) for one in shapes]


def _describe(audience: str, found: Held | Refusal | str | None, at: int) -> LastAnswer:
    if isinstance(found, Held):
        return LastAnswer(audience, GIVEN, at, found.token.id, found.token.expires_at)
    return LastAnswer(audience, TOO_MANY if found is None else str(found), at)


def _with_ready(answer: LastAnswer, held: Held | None) -> LastAnswer:
    if held is None:
        return answer
    return replace(answer, ready_id=held.token.id, ready_until=held.token.expires_at)


def _name(subject: Subject) -> bytes:
    """Return a digest of the guest. It stays if the policy changes, and not if the instance is created again."""
    guest = (subject.instance, subject.network, subject.project, subject.created_at, subject.epoch)
    return blake2b(repr(guest).encode(), digest_size=16).digest()
