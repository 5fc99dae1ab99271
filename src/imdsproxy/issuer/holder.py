"""Identity tokens that this host holds: fetched before guests request them, renewed, and shared by requests."""

import asyncio
import os
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol, TypeAlias

import structlog

from imdsproxy.errors import ImdsproxyError, SourceUnavailable, refusing
from imdsproxy.issuer.claims import Refusal
from imdsproxy.issuer.exchange import MOST_AT_ONCE, Token
from imdsproxy.issuer.rotation import MARGIN_S
from imdsproxy.model.subject import ID_PATTERN, Subject, parse_subject

CHECK_NONCE: Final = "imdsproxy-identity-check"
"""Claim `nonce` of the tokens of operators' checks: verifiers' logs show it."""

_SUBJECT_ID: Final = re.compile(ID_PATTERN)
_RATE_PER_S: Final = 5.0
_BURST: Final = 20.0
_KEPT: Final = 100_000
_EVERY_S: Final = 1.0
_RETRY_S: Final = 5.0
_MOST_FREE: Final = 16
"""Held tokens of a subject for audiences that no policy names: with `*` a guest could fill the memory."""

_SET_S: Final = 10.0
"""Seconds by which a clock must have been set to be noticed; tokens are back-dated by more."""

_REFUSED_S: Final = 60.0
"""Seconds until a token that was refused is requested again: the policy may have changed."""

_DOCUMENT_S: Final = float(MARGIN_S)
"""Seconds for which a signed document is given: after a rotation its key stays published at least so long."""

EARLIEST: Final = 0.5
LATEST: Final = 0.6
"""Parts of a token's life between which it is renewed, at random, so that hosts do not renew all at once."""

_log: Final = structlog.get_logger()

TokenKey: TypeAlias = tuple[str, str]
"""Id of a subject, and audience."""


@dataclass(frozen=True, slots=True)
class Wanted:
    id: str
    subject: Subject
    audience: str
    nonce: str | None = None


class TokenSource(Protocol):
    """Signer of this host, or the hubs of its fleet."""

    async def request(self, wanted: Sequence[Wanted]) -> Sequence[Token | Refusal]:
        """Return a token, or the reason why there is none, for each; raise `SourceUnavailable` without an answer."""

    async def document(self, name: str, subject: Subject) -> dict[str, str] | Refusal:
        """Return the document of a subject with its signatures, or why there is none; raise `SourceUnavailable`."""


@dataclass(frozen=True, slots=True)
class Held:
    """Token, with the monotonic time of its signature."""

    token: Token
    since: float

    def fresh_s(self, now: float) -> float:
        """Return the seconds for which guests get this token; after that, if possible, another one."""
        return self.token.lifetime_s / 2 - (now - self.since)

    def left_s(self, now: float) -> float:
        return self.token.lifetime_s - (now - self.since)


@dataclass(slots=True)
class _Share:
    """Requests for signatures that an instance has left: a bucket that fills with time."""

    left: float = _BURST
    at: float = 0.0

    def take(self, now: float) -> bool:
        self.left = min(_BURST, self.left + (now - self.at) * _RATE_PER_S)
        self.at = now
        if self.left < 1:
            return False
        self.left -= 1
        return True


@dataclass(slots=True)
class TokenHolder:
    """Holder of tokens, whose `run` fetches the tokens of all subjects' named audiences.

    Args:
        monotonic: Returns seconds since an arbitrary start.
        uniform: Returns a random number between two.
        wall: Returns the wall clock's time, Unix time.

    Attributes:
        given: Number of tokens by origin: `held`, `new`.
        refused: Number of refusals by reason.
        answers: Number of answers of the source, and their seconds.
        failure: Reason why the last request to the source failed; `None` after a success.
    """

    subjects: Path
    source: TokenSource
    monotonic: Callable[[], float]
    uniform: Callable[[float, float], float]
    wall: Callable[[], float]
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep
    held: dict[TokenKey, Held] = field(default_factory=dict)
    given: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    answers: int = 0
    answered_s: float = 0.0
    failure: str | None = None
    _documents: dict[str, tuple[dict[str, str], float]] = field(default_factory=dict)
    _due: dict[TokenKey, float] = field(default_factory=dict)
    _known: dict[str, Subject] = field(default_factory=dict)
    _listed: set[str] = field(default_factory=set)
    _unread: set[str] = field(default_factory=set)
    _pending: dict[TokenKey, asyncio.Task[Held | Refusal]] = field(default_factory=dict)
    _shares: dict[str, _Share] = field(default_factory=dict)
    _free: dict[str, set[str]] = field(default_factory=dict)
    _offset: float | None = None

    def read(self, name: str) -> Subject | None:
        """Return a subject by its id; `None` if the controller has removed it.

        Raises:
            HostRefused: The file cannot be read.
        """
        path = self.subjects / name
        if not _SUBJECT_ID.fullmatch(name):
            return None
        with refusing(f"read the subject {path}"):
            try:
                content = path.read_bytes()
            except FileNotFoundError:
                self._forget(name)
                return None
        known = self._known.get(name)
        if known is None:
            try:
                known = self._known[name] = parse_subject(content)
            except ValueError as error:
                raise SourceUnavailable(f"{path} is damaged: {error}") from error
        return known

    async def get(
        self, name: str, subject: Subject, audience: str, nonce: str | None
    ) -> Held | Refusal | None:
        """Return a token, held or new, or why there is none; `None` if the instance has requested too many.

        Raises:
            SourceUnavailable: No signer answers, and no held token is valid.
        """
        self._follow_clock()
        now, key = self.monotonic(), (name, audience)
        held = self.held.get(key) if nonce is None else None
        if held is not None and held.fresh_s(now) > 0:
            self.given["held"] += 1
            return held
        if not self._take_share(subject):
            self.refused["share"] += 1
            return None
        wanted = Wanted(name, subject, audience, nonce)
        try:
            if nonce is not None or self._is_full(wanted):
                return (await self._request([wanted]))[0]
            return await self._share_request(key, wanted)
        except SourceUnavailable:
            # A token in the second half of its life is still good.
            if held is None or held.left_s(now) <= 0:
                raise
            return held

    async def try_source(self, name: str, audience: str) -> Token | Refusal:
        """Request a token that no guest gets, for an operator's check; raise `SourceUnavailable` without an answer."""
        subject = self.read(name)
        if subject is None:
            return Refusal.SUBJECT
        return (await self.source.request([Wanted(name, subject, audience, CHECK_NONCE)]))[0]

    async def document(self, name: str, subject: Subject) -> dict[str, str] | Refusal | None:
        """Return a subject's document with its signatures, or why there is none; `None` after too many requests.

        Raises:
            SourceUnavailable: No signer answers, and no document is held.
        """
        if subject.document is None:
            return Refusal.DOCUMENT
        known, since = self._documents.get(name, (None, 0.0))
        if known is not None and self.monotonic() < since + _DOCUMENT_S:
            return known
        if not self._take_share(subject):
            return known
        try:
            found = await self.source.document(name, subject)
        except SourceUnavailable:
            if known is None:
                raise
            return known
        if not isinstance(found, Refusal):
            self._documents[name] = found, self.monotonic()
        return found

    def _take_share(self, subject: Subject) -> bool:
        now = self.monotonic()
        if len(self._shares) > _KEPT:
            self._shares.clear()
        return self._shares.setdefault(subject.instance, _Share(at=now)).take(now)

    def valid_tokens(self, name: str) -> dict[str, Held]:
        """Return the tokens of a subject that are held and valid, by audience."""
        now = self.monotonic()
        own = {audience: one for (id_, audience), one in self.held.items() if id_ == name}
        return {audience: one for audience, one in own.items() if one.left_s(now) > 0}

    def state(self) -> dict[str, object]:
        """Return the counts, and the reason why tokens cannot be had, as JSON."""
        return {
            "held": len(self.held),
            "given": dict(self.given),
            "refused": dict(self.refused),
            "answers": self.answers,
            "answered_s": self.answered_s,
            "failure": self.failure,
        }

    async def _share_request(self, key: TokenKey, wanted: Wanted) -> Held | Refusal:
        """Request a token; requests for the same token at one time share the answer."""
        task = self._pending.get(key)
        if task is None:
            task = self._pending[key] = asyncio.create_task(self._fetch(key, wanted))
            task.add_done_callback(lambda _: self._pending.pop(key, None))
        return await asyncio.shield(task)

    def _is_full(self, wanted: Wanted) -> bool:
        """Return whether a token is not held, since its subject has enough of those that no policy names."""
        free = self._free.get(wanted.id, set())
        named = wanted.audience in wanted.subject.named_audiences
        return not named and wanted.audience not in free and len(free) >= _MOST_FREE

    async def _fetch(self, key: TokenKey, wanted: Wanted) -> Held | Refusal:
        if wanted.audience not in wanted.subject.named_audiences:
            self._free.setdefault(wanted.id, set()).add(wanted.audience)
        try:
            return self._keep(key, (await self._request([wanted]))[0])
        finally:
            if key not in self._due:
                self._free.get(wanted.id, set()).discard(wanted.audience)

    async def _request(self, wanted: Sequence[Wanted]) -> list[Held | Refusal]:
        begun = self.monotonic()
        try:
            found = await self.source.request(wanted)
        except SourceUnavailable as error:
            self.failure = error.message
            raise
        self.failure = None
        now = self.monotonic()
        self.answers += 1
        self.answered_s += now - begun
        for one in found:
            if isinstance(one, Refusal):
                self.refused[one.value] += 1
            else:
                self.given["new"] += 1
        return [one if isinstance(one, Refusal) else Held(one, now) for one in found]

    def _keep(
        self, key: TokenKey, found: Held | Refusal, part: float | None = None
    ) -> Held | Refusal:
        """Hold a token, unless another request has just brought one; return what guests get.

        Args:
            part: Part of the token's life after which it is renewed.
        """
        now = self.monotonic()
        held = self.held.get(key)
        if isinstance(found, Refusal):
            self._due[key] = now + _REFUSED_S
            if found is Refusal.UNREADABLE and held is not None and held.left_s(now) > 0:
                return held
            self.held.pop(key, None)
            return found
        if held is None or held.fresh_s(now) <= 0:
            held = self.held[key] = found
            part = self.uniform(EARLIEST, LATEST) if part is None else part
            self._due[key] = held.since + part * held.token.lifetime_s
        return held

    def _forget(self, name: str) -> None:
        self._known.pop(name, None)
        self._documents.pop(name, None)
        self._free.pop(name, None)
        for key in [key for key in self._due if key[0] == name]:
            self._due.pop(key)
            self.held.pop(key, None)

    def _follow_clock(self) -> None:
        """Forget all tokens if the clock was set, or the host was suspended: the times in them do not fit any more."""
        offset = self.wall() - self.monotonic()
        before = self._offset
        if before is not None and abs(offset - before) <= _SET_S:
            return
        self._offset = offset
        if before is not None:
            _log.warning("the clock was set: all tokens are new", by_s=round(offset - before))
            self.held.clear()
            self._due = dict.fromkeys(self._due, self.monotonic())

    async def run(self) -> None:
        """Fetch and renew tokens until cancelled."""
        while True:
            try:
                self._follow_clock()
                self._look()
                pause = await self._renew()
            except ImdsproxyError as error:
                _log.warning("identity tokens not renewed", reason=error.message, hint=error.hint)
                pause = self.uniform(_RETRY_S, 2 * _RETRY_S)
            await self.pause(pause)

    def _look(self) -> None:
        """Find new subjects, and forget those that the controller has removed."""
        with refusing(f"list the subjects in {self.subjects}"):
            names = {name for name in os.listdir(self.subjects) if _SUBJECT_ID.fullmatch(name)}  # noqa: PTH208 - names only
        for name in {key[0] for key in self._due} - names:
            self._forget(name)
        # A guest's request may have read a subject before: its other audiences are fetched all the same.
        unread = set[str]()
        for name in names - self._listed:
            try:
                subject = self.read(name)
            except ImdsproxyError as error:
                # It harms no other subject, and is read again in the next round.
                unread.add(name)
                if name not in self._unread:
                    _log.error("a subject is not read", reason=error.message)
                continue
            for audience in () if subject is None else subject.named_audiences:
                self._due.setdefault((name, audience), self.monotonic())
        self._listed, self._unread = names - unread, unread

    async def _renew(self) -> float:
        """Renew tokens if one is due; return the seconds until the next look.

        All tokens in the second half of their life are renewed with it, and again with it: a request to a hub costs
        as much as several signatures.
        """
        now = self.monotonic()
        due = sorted((at, key) for key, at in self._due.items() if self._is_old(key, at, now))
        due = due[:MOST_AT_ONCE] if due and due[0][0] <= now else []
        part = self.uniform(EARLIEST, LATEST)
        wanted: list[Wanted] = []
        for _, (name, audience) in due:
            subject = self._known.get(name)
            if subject is None or audience not in subject.named_audiences:
                # A guest has requested it, of an audience that `*` allows.
                del self._due[name, audience]
                self._free.get(name, set()).discard(audience)
                self.held.pop((name, audience), None)
            else:
                wanted.append(Wanted(name, subject, audience))
        if wanted:
            for one, found in zip(wanted, await self._request_due(wanted), strict=True):
                self._keep((one.id, one.audience), found, part)
        return 0.0 if len(due) == MOST_AT_ONCE else _EVERY_S

    async def _request_due(self, wanted: Sequence[Wanted]) -> list[Held | Refusal]:
        try:
            return await self._request(wanted)
        except SourceUnavailable:
            # The next attempt begins with other tokens: none waits for those that are never answered.
            for one in wanted:
                self._due[one.id, one.audience] = self.monotonic() + _RETRY_S
            raise

    def _is_old(self, key: TokenKey, due: float, now: float) -> bool:
        """Return whether a token is due, or in the second half of its life."""
        held = self.held.get(key)
        return due <= now or (held is not None and held.fresh_s(now) <= 0)
