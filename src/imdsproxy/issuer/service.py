"""Process behind HAProxy that answers guests' requests for identity tokens. It holds tokens, and no key."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, cast
from urllib.parse import parse_qs, parse_qsl

import structlog

from imdsproxy.documents.dialects.respond import Answer, Header, refusal, retry_later
from imdsproxy.documents.http import LIVENESS_PATH, Receive, Scope, Send, read_body, send_answer
from imdsproxy.errors import ImdsproxyError
from imdsproxy.issuer.claims import Refusal, is_audience, is_nonce
from imdsproxy.issuer.exchange import render_problem, render_shape
from imdsproxy.issuer.formats import TokenFormat, render_token
from imdsproxy.issuer.holder import Held, TokenHolder
from imdsproxy.issuer.recent import UNSIGNED, RecentAnswers, render_answers
from imdsproxy.model import wire
from imdsproxy.model.subject import Subject

STATE_PATH: Final = b"/state"
"""Path of the process's counts, for the controller."""

CHECK_PATH: Final = b"/check"
"""Path of an operator's check, for the controller; its query has `subject` (an id) and `audience`."""

RECENT_PATH: Final = b"/recent"
"""Path of the last answers to a guest, for the controller; its query has `subject` (an id)."""

_TEXT: Final = wire.TEXT
_JSON: Final = b"application/json"
_NOT_STORED: Final[Header] = (b"cache-control", b"no-store")
_UNAUTHORIZED: Final = 401
_CHALLENGE: Final[tuple[Header, ...]] = ((b"www-authenticate", b'Basic realm="imdsproxy"'),)
_STATUS: Final = {
    Refusal.REQUEST: 400,
    Refusal.AUDIENCE: 403,
    Refusal.PLACEMENT: 403,
    Refusal.PROJECT: 403,
    Refusal.TAGS: 403,
}

_log: Final = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Asked:
    """Request of a guest; HAProxy names the subject, the guest names the rest."""

    subject: str
    audience: str
    nonce: str | None
    form: TokenFormat


@dataclass(slots=True)
class IdentityService:
    """ASGI application that answers a guest's requests for the subject that HAProxy names.

    Attributes:
        openstack_audience: Audience of the tokens for clients of Keystone; `None` gives them none.
    """

    holder: TokenHolder
    openstack_audience: str | None = None
    recent: RecentAnswers = field(default_factory=RecentAnswers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = cast("Iterable[Header]", scope["headers"])
        found = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
        if wire.HEADER_SUBJECT not in found:
            # HAProxy's check, or the controller's question; a guest's request names its subject.
            await send_answer(await self._answer_host(scope), send)
            return
        body = b""
        if scope["method"] not in {"GET", "HEAD"}:
            read = await read_body(receive)
            if not isinstance(read, bytes):
                if read is not None:
                    await send_answer(read, send)
                return
            body = read
        path = cast("bytes", scope["raw_path"]).decode("latin-1")
        try:
            if path in wire.DOCUMENT_PATHS:
                answer = await self._document(found[wire.HEADER_SUBJECT], path)
            elif path == wire.OPENSTACK_TOKEN_PATH:
                answer = await self._grant(found, body)
            else:
                answer = await self._answer(found, cast("bytes", scope["query_string"]))
        except ImdsproxyError as error:
            _log.error("no identity token", reason=error.message, hint=error.hint)
            answer = retry_later()
        await send_answer(answer, send)

    async def _answer_host(self, scope: Scope) -> Answer:
        path, query = scope["raw_path"], cast("bytes", scope["query_string"])
        if path == STATE_PATH:
            return _json(200, self.holder.state())
        values = dict(parse_qsl(query.decode("latin-1")))
        if path == RECENT_PATH:
            return self._list_recent(values.get("subject", ""))
        if path == CHECK_PATH:
            return await self._check(values.get("subject", ""), values.get("audience", ""))
        return refusal(200 if path == LIVENESS_PATH else 400)

    async def _check(self, name: str, audience: str) -> Answer:
        """Answer an operator's check of a subject and an audience: a token or the exact reason why there is none."""
        try:
            return _json(200, render_shape(await self.holder.try_source(name, audience)))
        except ImdsproxyError as error:
            return _json(200, render_problem(error))

    def _list_recent(self, name: str) -> Answer:
        subject = self.holder.read(name)
        if subject is None:
            return refusal(404)
        answers = self.recent.list_answers(subject, self.holder.valid_tokens(name))
        return _json(200, render_answers(answers))

    async def _get(
        self, name: str, subject: Subject, audience: str, nonce: str | None
    ) -> Held | Refusal | None:
        """Return a token as `TokenHolder.get`, and note the answer."""
        try:
            found = await self.holder.get(name, subject, audience, nonce)
        except ImdsproxyError:
            self.recent.note(subject, audience, UNSIGNED, self.holder.wall())
            raise
        self.recent.note(subject, audience, found, self.holder.wall())
        return found

    async def _document(self, name: str, path: str) -> Answer:
        subject = self.holder.read(name)
        found = None if subject is None else await self.holder.document(name, subject)
        if found is None:
            return retry_later()
        if isinstance(found, Refusal):
            return refusal(404)
        body = found[path.rpartition("/")[2]].encode()
        kind = _TEXT if path != wire.DOCUMENT_PATHS[0] else _JSON
        length = (b"content-length", b"%d" % len(body))
        return Answer(200, ((b"content-type", kind), length, _NOT_STORED), body)

    async def _grant(self, headers: Mapping[str, str], body: bytes) -> Answer:
        """Answer a request for an access token by client credentials (RFC 6749 section 4.4)."""
        if (fault := _find_fault(headers, body)) is not None:
            return fault
        name, audience = headers[wire.HEADER_SUBJECT], self.openstack_audience
        subject = self.holder.read(name)
        if subject is None:
            return retry_later()
        if audience is None or not subject.allows(audience):
            if audience is not None:
                self.recent.note(subject, audience, Refusal.AUDIENCE, self.holder.wall())
            return _oauth_error("unauthorized_client")
        held = await self._get(name, subject, audience, None)
        if held in _STATUS:
            return _oauth_error("unauthorized_client")
        if held is None or isinstance(held, Refusal):
            return retry_later()
        left_s = int(held.left_s(self.holder.monotonic()))
        shape = {"access_token": held.token.text, "token_type": "Bearer", "expires_in": left_s}
        token_id = (wire.HEADER_TOKEN_ID.encode("ascii"), held.token.id.encode("ascii"))
        return _json(200, shape, token_id)

    async def _answer(self, headers: Mapping[str, str], query: bytes) -> Answer:
        asked = _parse(headers, query)
        if asked is None:
            return refusal(400)
        subject = self.holder.read(asked.subject)
        if subject is None:
            return retry_later()
        if not subject.allows(asked.audience):
            self.recent.note(subject, asked.audience, Refusal.AUDIENCE, self.holder.wall())
            # As HAProxy answers an instance without a subject, which this one has for its signed document alone.
            return refusal(403 if subject.audiences else 404)
        held = await self._get(asked.subject, subject, asked.audience, asked.nonce)
        if isinstance(held, Refusal):
            reason = held.value
            _log.warning(
                "refused", instance=subject.instance, audience=asked.audience, reason=reason
            )
            return refusal(_STATUS[held]) if held in _STATUS else retry_later()
        if held is None:
            return retry_later()
        return _answer_with(held, self.holder.monotonic(), asked)


def _parse(headers: Mapping[str, str], query: bytes) -> _Asked | None:
    """Parse a request; `None` if its query, audience or nonce has a wrong form."""
    values = parse_qs(query.decode("latin-1"), keep_blank_values=True)
    forms = values.pop("format", [TokenFormat.TEXT.value])
    audience, nonce = headers.get(wire.HEADER_AUDIENCE, ""), headers.get(wire.HEADER_NONCE)
    well_formed = is_audience(audience) and (nonce is None or is_nonce(nonce))
    if values or len(forms) != 1 or forms[0] not in set(TokenFormat) or not well_formed:
        return None
    return _Asked(headers[wire.HEADER_SUBJECT], audience, nonce, TokenFormat(forms[0]))


def _find_fault(headers: Mapping[str, str], body: bytes) -> Answer | None:
    """Return the refusal of a request that is none for client credentials.

    Any name of a client will do, because a guest proves who it is by its place. `HEADER_CLIENT` says how HAProxy
    has understood an `Authorization` header.
    """
    form = parse_qs(body.decode("latin-1"))
    grants, client = form.get("grant_type", ()), headers.get(wire.HEADER_CLIENT)
    if len(grants) != 1:
        return _oauth_error("invalid_request")
    if grants[0] != "client_credentials":
        return _oauth_error("unsupported_grant_type")
    if client == wire.CLIENT_NAMED:
        return None
    if client is not None:
        return _oauth_error("invalid_client", status=_UNAUTHORIZED)
    return None if len(form.get("client_id", ())) == 1 else _oauth_error("invalid_client")


def _oauth_error(code: str, *, status: int = 400) -> Answer:
    """Return a refusal in the form of RFC 6749 section 5.2; 401 names the scheme that is understood."""
    return _json(status, {"error": code}, *(_CHALLENGE if status == _UNAUTHORIZED else ()))


def _json(status: int, shape: Mapping[str, object], *headers: Header) -> Answer:
    body = json.dumps(shape).encode("ascii")
    length = (b"content-length", b"%d" % len(body))
    pragma = (b"pragma", b"no-cache")
    return Answer(status, ((b"content-type", _JSON), length, _NOT_STORED, pragma, *headers), body)


def _answer_with(held: Held, now: float, asked: _Asked) -> Answer:
    content_type, text = render_token(held.token, asked.form)
    body = text.encode("ascii")
    headers: list[Header] = [
        (b"content-type", content_type.encode("ascii")),
        (b"content-length", b"%d" % len(body)),
        _NOT_STORED,
        (wire.HEADER_TOKEN_ID.encode("ascii"), held.token.id.encode("ascii")),
    ]
    fresh_s = int(held.fresh_s(now))
    if asked.nonce is None and asked.form is TokenFormat.TEXT and fresh_s > 0:
        headers.append((wire.HEADER_FRESH.encode("ascii"), b"%d" % fresh_s))
    return Answer(200, tuple(headers), body)
