"""Errors as the admin API tells them: which HTTP status, and one shape of body (RFC 9457)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from pydantic import BaseModel, Field
from starlette.responses import JSONResponse

from imdsproxy.core.wire import RETRY_AFTER_S
from imdsproxy.errors import (
    AlreadyExists,
    ConfigError,
    ImdsproxyError,
    NotFound,
    Problem,
    RequestRefused,
    SourceRefused,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

PROBLEM_JSON: Final = "application/problem+json"
_UNAVAILABLE: Final = 503


class ProblemField(BaseModel):
    """One thing wrong, and where."""

    field: str = Field(description="Path in the body or the configuration.")
    reason: str
    hint: str = ""
    file: str | None = None
    line: int | None = None


class ProblemBody(BaseModel):
    """Every answer from 400 up."""

    status: int
    code: str = Field(description="Stable and kebab-case; the reference lists them.")
    message: str
    hint: str = ""
    problems: list[ProblemField] = Field(default_factory=list)


_ERROR: Final = {"description": "What is wrong, with the fields", "model": ProblemBody}
ERRORS: Final[dict[int | str, dict[str, Any]]] = {"4XX": _ERROR, "5XX": _ERROR}
"""Every route's errors, for OpenAPI."""

_STATUS: Final[tuple[tuple[type[ImdsproxyError], int], ...]] = (
    (NotFound, 404),
    (AlreadyExists, 409),
    (RequestRefused, 422),
    (SourceRefused, 409),
    (ConfigError, 422),
)


def status_of(error: ImdsproxyError | type[ImdsproxyError]) -> int:
    """The HTTP status of an error: by its class, then 503 where trying again helps, else 500."""
    kind = error if isinstance(error, type) else type(error)
    for known, status in _STATUS:
        if issubclass(kind, known):
            return status
    return _UNAVAILABLE if kind.retryable else 500


def refusal(
    status: int, code: str, message: str, *, hint: str = "", problems: Sequence[Problem] = ()
) -> JSONResponse:
    """An answer that says what is wrong; 503 says when to try again."""
    body = {
        "status": status,
        "code": code,
        "message": message,
        "hint": hint,
        "problems": [
            {
                "field": problem.field,
                "reason": problem.reason,
                "hint": problem.hint,
                "file": problem.file,
                "line": problem.line,
            }
            for problem in problems
        ],
    }
    headers = {"retry-after": str(RETRY_AFTER_S)} if status == _UNAVAILABLE else None
    return JSONResponse(body, status, headers, media_type=PROBLEM_JSON)
