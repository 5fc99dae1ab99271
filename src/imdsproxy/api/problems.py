"""Errors as answers of imdsproxy's APIs: one `ProblemBody` (RFC 9457) from 400 up, described by OpenAPI."""

from collections.abc import Sequence
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from imdsproxy import __version__
from imdsproxy.errors import ImdsproxyError, Problem
from imdsproxy.model.wire import RETRY_AFTER_S

_PROBLEM_JSON: Final = "application/problem+json"
_UNAVAILABLE: Final = 503
_CODES: Final = {404: "no-such-route", 405: "method-not-allowed"}


class ProblemField(BaseModel):
    """A problem and its field."""

    model_config = ConfigDict(from_attributes=True)

    field: str = Field(description="Path in the body or the configuration.")
    reason: str
    hint: str = ""
    file: str | None = None
    line: int | None = None


class ProblemBody(BaseModel):
    """Body of every answer from 400 up."""

    status: int
    code: str = Field(description="Stable and kebab-case; the reference lists them.")
    message: str
    hint: str = ""
    problems: list[ProblemField] = Field(default_factory=list)


ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    status: {"description": "What is wrong, with the fields", "model": ProblemBody}
    for status in ("4XX", "5XX")
}
"""Answers of every route from 400 up, for `include_router`."""


class _App(FastAPI):
    """FastAPI with the content type of errors: FastAPI itself describes them under the type of the good answers."""

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI document, built once."""
        if self.openapi_schema is not None:
            return self.openapi_schema
        document = super().openapi()
        for operation in (one for path in document["paths"].values() for one in path.values()):
            for status in ("4XX", "5XX"):
                answer = operation["responses"][status]
                (described,) = answer["content"].values()
                answer["content"] = {_PROBLEM_JSON: described}
        return document


def new_app(title: str, description: str) -> FastAPI:
    """Build an application without routes; `/openapi.json` describes it."""
    app = _App(
        title=title,
        version=__version__,
        description=description,
        docs_url=None,  # FastAPI's pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
    )
    for kind in (ImdsproxyError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _explain)
    return app


async def _explain(request: Request, error: Exception) -> JSONResponse:
    match error:
        case ImdsproxyError() as one:
            return answer_for(one)
        case RequestValidationError():
            each = ((list(map(str, one["loc"])), one["msg"]) for one in error.errors())
            found = [Problem(".".join(steps[1:] or steps), reason) for steps, reason in each]
            return _answer(422, "request-refused", "the request is not acceptable", problems=found)
        case HTTPException(status_code=400):
            return _answer(422, "request-refused", "the body is not JSON that this API can read")
        case HTTPException(status_code=status):
            message = f"{request.method} {request.url.path} is not part of this API"
            code = _CODES.get(status, "request-refused")
            return _answer(status, code, message, "/openapi.json lists all routes")
        case _:
            message = f"imdsproxy has a fault: {type(error).__name__}"
            hint = "the daemon's log has the details; please report them"
            return _answer(500, "internal", message, hint)


def answer_for(error: ImdsproxyError) -> JSONResponse:
    """Return the answer to a request that this error ended."""
    return _answer(error.http_status, error.code, error.message, error.hint, error.problems)


def _answer(
    status: int, code: str, message: str, hint: str = "", problems: Sequence[Problem] = ()
) -> JSONResponse:
    fields = [ProblemField.model_validate(problem) for problem in problems]
    body = ProblemBody(status=status, code=code, message=message, hint=hint, problems=fields)
    headers = {"retry-after": str(RETRY_AFTER_S)} if status == _UNAVAILABLE else None
    return JSONResponse(body.model_dump(), status, headers, media_type=_PROBLEM_JSON)
