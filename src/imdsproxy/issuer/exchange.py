"""Lines between the process that answers guests, the signer, and what manages the signer's keys.

Each request is one line of JSON on a unix socket, and so is its answer.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from imdsproxy.errors import ClockWrong, ImdsproxyError, SourceUnavailable
from imdsproxy.issuer.claims import Placement, Refusal
from imdsproxy.model.subject import Subject, parse_subject

MOST_AT_ONCE: Final = 64
"""Maximum number of tokens in one request to a hub."""

CLOCKS_S: Final = 45.0
"""Largest difference of clocks between hubs, or of hub and host.

Tokens are back-dated by thirty seconds, and some verifiers have no leeway.
"""

LONGEST_LINE: Final = 64 * 1024
"""Bytes of the longest line: a subject may have many tags."""


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """Request for a token.

    Attributes:
        subject: Id of a subject in the signer's directory. A hub sends the subject itself.
        placement: Proof that the subject is on the host that asks; the signer of a host alone knows none but `local`.
    """

    subject: str | Subject
    audience: str
    nonce: str | None = None
    placement: Placement = Placement.LOCAL


@dataclass(frozen=True, slots=True)
class Token:
    """Signed token.

    Times are seconds from now, so that the clocks of two hosts need not agree.

    Attributes:
        id: The claim `jti`, for logs: a log never holds the token.
        expires_at: The claim `exp`, Unix time.
    """

    text: str
    id: str
    expires_at: int
    lifetime_s: int


def render_request(request: TokenRequest) -> bytes:
    shape = {
        "sign": _spell(request.subject),
        "audience": request.audience,
        "nonce": request.nonce,
        "placement": request.placement.value,
    }
    return _line(shape)


def parse_request(shape: Mapping[str, Any]) -> TokenRequest:
    """Parse the result of `render_request`; raise `ValueError` if it is none."""
    try:
        name, audience, nonce = shape["sign"], shape["audience"], shape["nonce"]
        placement = Placement(shape["placement"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"no request for a token: {error}") from error
    if not all(isinstance(one, str) for one in (name, audience, nonce or "")):
        raise ValueError("no request for a token: a value is no text")
    subject = parse_subject(name.encode()) if name.startswith("{") else name
    return TokenRequest(subject, audience, nonce, placement)


def render_document_request(subject: str | Subject) -> bytes:
    """Render a request for the signed document of a subject, given as in `TokenRequest`."""
    return _line({"document": _spell(subject)})


def parse_document_request(shape: Mapping[str, Any]) -> str | Subject:
    """Parse the result of `render_document_request`; raise `ValueError` if it is none."""
    name = shape["document"]
    if not isinstance(name, str):
        raise ValueError("no request for a document: the subject is no text")  # noqa: TRY004 - as of any other line
    return parse_subject(name.encode()) if name.startswith("{") else name


def render_documents(answer: Mapping[str, str] | Refusal) -> bytes:
    """Render a document and its signatures, by name."""
    if isinstance(answer, Refusal):
        return render_answer(answer)
    return _line({"documents": dict(answer)})


def parse_documents(shape: Mapping[str, Any]) -> dict[str, str] | Refusal:
    """Parse the line of `render_documents`, as JSON; raise as `parse_shape`."""
    _raise_problem(shape)
    try:
        if "refused" in shape:
            return Refusal(shape["refused"])
        return {str(name): str(text) for name, text in shape["documents"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no document of a signer: {error}") from error


def render_shape(answer: Token | Refusal) -> dict[str, object]:
    """Return an answer as JSON; `parse_shape` reverses it."""
    if isinstance(answer, Refusal):
        return {"refused": answer.value}
    return {"token": asdict(answer)}


def parse_shape(shape: Mapping[str, Any]) -> Token | Refusal:
    """Parse the result of `render_shape`.

    Raises:
        ValueError: It is none.
        SourceUnavailable: It is the result of `render_problem`; `ClockWrong` as there.
    """
    _raise_problem(shape)
    try:
        return Refusal(shape["refused"]) if "refused" in shape else Token(**shape["token"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"no answer of a signer: {error}") from error


def render_answer(answer: Token | Refusal) -> bytes:
    return _line(render_shape(answer))


def parse_answer(line: bytes) -> Token | Refusal:
    """Parse the result of `render_answer`; raise as `parse_shape`."""
    try:
        shape = json.loads(line)
    except RecursionError as error:
        raise ValueError("no answer of a signer") from error
    if not isinstance(shape, dict):
        raise ValueError("no answer of a signer")  # noqa: TRY004 - as of any other line
    return parse_shape(shape)


def render_problem(error: ImdsproxyError) -> dict[str, object]:
    """Return the reason why nothing is signed as JSON."""
    return {"problem": error.message, "hint": error.hint, "code": error.code}


def _raise_problem(shape: Mapping[str, Any]) -> None:
    if "problem" not in shape:
        return
    kind = ClockWrong if shape.get("code") == ClockWrong.code else SourceUnavailable
    raise kind(f"the signer cannot sign: {shape['problem']}", hint=str(shape.get("hint", "")))


def _spell(subject: str | Subject) -> str:
    return subject if isinstance(subject, str) else subject.render().decode("ascii")


def _line(shape: Mapping[str, object]) -> bytes:
    return json.dumps(shape, separators=(",", ":")).encode("ascii") + b"\n"
