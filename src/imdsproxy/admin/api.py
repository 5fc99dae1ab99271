"""The admin API: an ASGI application over the controller's parts, described by its own OpenAPI document.

It is served on a unix socket only, whose mode and owner say who may use it. Every answer from 400
up is one `ProblemBody` (RFC 9457).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from imdsproxy import __version__
from imdsproxy.admin.routes import router
from imdsproxy.controller.controller import Controller
from imdsproxy.core.wire import RETRY_AFTER_S
from imdsproxy.errors import ImdsproxyError, Problem

_PROBLEM_JSON: Final = "application/problem+json"
_UNAVAILABLE: Final = 503
_CODES: Final = {404: "no-such-route", 405: "method-not-allowed"}


class ProblemField(BaseModel):
    """One thing wrong, and where."""

    model_config = ConfigDict(from_attributes=True)

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


class _AdminApp(FastAPI):
    """FastAPI, which describes errors under the type of the good answers; ours have their own."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document, made once."""
        if self.openapi_schema is not None:
            return self.openapi_schema
        document = super().openapi()
        for operation in (one for path in document["paths"].values() for one in path.values()):
            for status in ("4XX", "5XX"):
                answer = operation["responses"][status]
                (described,) = answer["content"].values()
                answer["content"] = {_PROBLEM_JSON: described}
        return document


def admin_app(controller: Controller | None) -> FastAPI:
    """The application; `/openapi.json` describes it, `/v1/…` are its routes.

    Args:
        controller: What its routes use; `None` where it is only described.
    """
    app = _AdminApp(
        title="imdsproxy admin API",
        version=__version__,
        description="Networks, instances and the state of one imdsproxy daemon.",
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.controller = controller
    app.include_router(router, prefix="/v1", responses={"4XX": _ERROR, "5XX": _ERROR})
    app.add_exception_handler(ImdsproxyError, _refused)
    app.add_exception_handler(RequestValidationError, _unacceptable)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(Exception, _internal)
    return app


async def _refused(_request: Request, error: Exception) -> JSONResponse:
    one = cast("ImdsproxyError", error)
    return _answer(one.http_status, one.code, one.message, one.hint, one.problems)


async def _unacceptable(_request: Request, error: Exception) -> JSONResponse:
    problems = []
    for each in cast("RequestValidationError", error).errors():
        steps = [str(step) for step in each["loc"]]
        problems.append(Problem(".".join(steps[1:]) or ".".join(steps), each["msg"]))
    return _answer(422, "request-refused", "the request is not acceptable", problems=problems)


async def _no_route(request: Request, error: Exception) -> JSONResponse:
    status = cast("HTTPException", error).status_code
    message = f"{request.method} {request.url.path} is not part of this API"
    code = _CODES.get(status, "request-refused")
    return _answer(status, code, message, "/openapi.json lists all routes")


async def _internal(_request: Request, error: Exception) -> JSONResponse:
    message = f"imdsproxy has a fault: {type(error).__name__}"
    hint = "the daemon's log has the details; please report them"
    return _answer(500, "internal", message, hint)


def _answer(
    status: int, code: str, message: str, hint: str = "", problems: Sequence[Problem] = ()
) -> JSONResponse:
    """What is wrong; 503 says when to try again."""
    fields = [ProblemField.model_validate(problem) for problem in problems]
    body = ProblemBody(status=status, code=code, message=message, hint=hint, problems=fields)
    headers = {"retry-after": str(RETRY_AFTER_S)} if status == _UNAVAILABLE else None
    return JSONResponse(body.model_dump(), status, headers, media_type=_PROBLEM_JSON)
