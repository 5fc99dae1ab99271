"""Process behind HAProxy that answers guests' requests for identity tokens. It holds tokens, and no key."""

import asyncio
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol, cast
from urllib.parse import parse_qs

import structlog

from imdsproxy.documents.dialects.respond import Answer, Header, refusal, retry_later
from imdsproxy.documents.http import LIVENESS_PATH, Receive, Scope, Send, read_body, send_answer
from imdsproxy.errors import ImdsproxyError, SourceUnavailable, refusing
from imdsproxy.host.clock import Clock
from imdsproxy.issuer.claims import Refusal, is_audience, is_nonce
from imdsproxy.issuer.exchange import Token, TokenRequest, parse_answer, render_request
from imdsproxy.issuer.formats import TokenFormat, render_token
from imdsproxy.model import wire
from imdsproxy.model.subject import ID_PATTERN, Subject, parse_subject

_SUBJECT_ID: Final = re.compile(ID_PATTERN)
_RATE_PER_S: Final = 5.0
_BURST: Final = 20.0
_PATIENCE_S: Final = 5.0
_KEPT: Final = 100_000
_STATUS: Final = {
    Refusal.REQUEST: 400,
    Refusal.AUDIENCE: 403,
    Refusal.PLACEMENT: 403,
    Refusal.PROJECT: 403,
}

_log: Final = structlog.get_logger()


class TokenSource(Protocol):
    """Signer of this host, or the hubs of its fleet."""

    async def request(
        self, subject: str, facts: Subject, audience: str, nonce: str | None
    ) -> Token | Refusal:
        """Return a token, or why there is none; raise `SourceUnavailable` if no answer comes."""


@dataclass(slots=True)
class LocalSigner:
    """Signer of this host."""

    path: Path

    async def request(
        self, subject: str, _facts: Subject, audience: str, nonce: str | None
    ) -> Token | Refusal:
        line = render_request(TokenRequest(subject, audience, nonce))
        try:
            async with asyncio.timeout(_PATIENCE_S):
                reader, writer = await asyncio.open_unix_connection(str(self.path))
                try:
                    writer.write(line)
                    answer = await reader.readline()
                finally:
                    writer.close()
            return parse_answer(answer)
        except (OSError, ValueError, TimeoutError) as error:
            raise SourceUnavailable(f"the signer does not answer: {error}") from error


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


@dataclass(frozen=True, slots=True)
class _Held:
    token: Token
    since: float

    def is_fresh(self, now: float) -> bool:
        """Return whether the token is in the first half of its life."""
        return now - self.since < self.token.lifetime_s / 2

    def left_s(self, now: float) -> float:
        return self.token.lifetime_s - (now - self.since)


@dataclass(frozen=True, slots=True)
class _Asked:
    """Request of a guest; HAProxy names the subject, the guest names the rest."""

    subject: str
    audience: str
    nonce: str | None
    form: TokenFormat


@dataclass(slots=True)
class IdentityService:
    """ASGI application that answers `PUT /latest/api/identity` for the subject that HAProxy names."""

    subjects: Path
    source: TokenSource
    clock: Clock
    _held: dict[tuple[str, str], _Held] = field(default_factory=dict)
    _pending: dict[tuple[str, str], asyncio.Task[_Held | Refusal]] = field(default_factory=dict)
    _shares: dict[str, _Share] = field(default_factory=dict)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = cast("Iterable[Header]", scope["headers"])
        found = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
        if wire.HEADER_SUBJECT not in found:
            status = 200 if scope["raw_path"] == LIVENESS_PATH else 400
            await send_answer(refusal(status), send)
            return
        if scope["method"] not in {"GET", "HEAD"}:
            await read_body(receive)
        try:
            answer = await self._answer(found, cast("bytes", scope["query_string"]))
        except ImdsproxyError as error:
            _log.error("no identity token", reason=error.message, hint=error.hint)
            answer = retry_later()
        await send_answer(answer, send)

    async def _answer(self, headers: Mapping[str, str], query: bytes) -> Answer:
        asked = _parse(headers, query)
        if asked is None:
            return refusal(400)
        subject = self._read(asked.subject)
        if subject is None:
            return retry_later()
        if not subject.allows(asked.audience):
            return refusal(403)
        held = await self._hold(asked, subject)
        if isinstance(held, Refusal):
            reason = held.value
            _log.warning(
                "refused", instance=subject.instance, audience=asked.audience, reason=reason
            )
            return refusal(_STATUS[held]) if held in _STATUS else retry_later()
        if held is None:
            return retry_later()
        return _answer_with(held, self.clock.monotonic(), asked)

    async def _hold(self, asked: _Asked, subject: Subject) -> _Held | Refusal | None:
        """Return a token, held or new, or why there is none; `None` if the instance has requested too many.

        Raises:
            SourceUnavailable: No signer answers, and no held token is valid.
        """
        now = self.clock.monotonic()
        held = None if asked.nonce else self._held.get((asked.subject, asked.audience))
        if held is not None and held.is_fresh(now):
            return held
        if len(self._shares) > _KEPT:
            self._shares.clear()
        if not self._shares.setdefault(subject.instance, _Share(at=now)).take(now):
            return None
        try:
            return await self._fetch(asked, subject)
        except SourceUnavailable:
            # A token in its second half is still good.
            if held is None or held.left_s(now) <= 0:
                raise
            return held

    async def _fetch(self, asked: _Asked, subject: Subject) -> _Held | Refusal:
        """Fetch a token; requests for the same token share one."""
        if asked.nonce is not None:
            return await self._request(asked, subject)
        key = asked.subject, asked.audience
        task = self._pending.get(key)
        if task is None:
            task = self._pending[key] = asyncio.create_task(self._request(asked, subject))
            task.add_done_callback(lambda _: self._pending.pop(key, None))
        found = await asyncio.shield(task)
        if isinstance(found, _Held):
            self._held[key] = found
        return found

    async def _request(self, asked: _Asked, subject: Subject) -> _Held | Refusal:
        token = await self.source.request(asked.subject, subject, asked.audience, asked.nonce)
        return token if isinstance(token, Refusal) else _Held(token, self.clock.monotonic())

    def _read(self, name: str) -> Subject | None:
        """Return the subject; `None` if it has gone meanwhile."""
        path = self.subjects / name
        if not _SUBJECT_ID.fullmatch(name):
            return None
        with refusing(f"read the subject {path}"):
            try:
                return parse_subject(path.read_bytes())
            except FileNotFoundError:
                for key in [key for key in self._held if key[0] == name]:
                    del self._held[key]
                return None


def _parse(headers: Mapping[str, str], query: bytes) -> _Asked | None:
    """Parse a request; `None` if its query, audience or nonce has a wrong form."""
    values = parse_qs(query.decode("latin-1"), keep_blank_values=True)
    forms = values.pop("format", [TokenFormat.TEXT.value])
    audience, nonce = headers.get(wire.HEADER_AUDIENCE, ""), headers.get(wire.HEADER_NONCE)
    well_formed = is_audience(audience) and (nonce is None or is_nonce(nonce))
    if values or len(forms) != 1 or forms[0] not in set(TokenFormat) or not well_formed:
        return None
    return _Asked(headers[wire.HEADER_SUBJECT], audience, nonce, TokenFormat(forms[0]))


def _answer_with(held: _Held, now: float, asked: _Asked) -> Answer:
    content_type, text = render_token(held.token, asked.form)
    body = text.encode("ascii")
    headers: list[Header] = [
        (b"content-type", content_type.encode("ascii")),
        (b"content-length", b"%d" % len(body)),
        (b"cache-control", b"no-store"),
        (wire.HEADER_TOKEN_ID.encode("ascii"), held.token.id.encode("ascii")),
    ]
    fresh_s = int(held.token.lifetime_s / 2 - (now - held.since))
    if asked.nonce is None and asked.form is TokenFormat.TEXT and fresh_s > 0:
        headers.append((wire.HEADER_FRESH.encode("ascii"), b"%d" % fresh_s))
    return Answer(200, tuple(headers), body)
