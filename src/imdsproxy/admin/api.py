"""The admin API: an ASGI application over services, described by its own OpenAPI document.

It is served on a unix socket only, whose mode and owner say who may use it. Every answer from 400
up has the one shape of `imdsproxy.admin.refusals`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from imdsproxy.admin import daemon_routes, record_routes
from imdsproxy.admin.refusals import PROBLEM_JSON, refusal, status_of
from imdsproxy.errors import ImdsproxyError, Problem

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.responses import JSONResponse

    from imdsproxy.admin.services import Services

_CODES: Final = {404: "no-such-route", 405: "method-not-allowed"}


class _AdminApp(FastAPI):
    """FastAPI, which describes errors under the type of the good answers; ours have their own."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document, made once."""
        known = self.openapi_schema is not None
        document = super().openapi()
        if not known:
            for operations in document["paths"].values():
                for operation in operations.values():
                    for status in ("4XX", "5XX"):
                        answer = operation["responses"][status]
                        (described,) = answer["content"].values()
                        answer["content"] = {PROBLEM_JSON: described}
        return document


def admin_app(services: Services | None, *, version: str) -> FastAPI:
    """The application; `/openapi.json` describes it, `/v1/…` are its routes.

    Args:
        services: What its routes use; `None` where it is only described.
        version: Of imdsproxy, for the OpenAPI document.
    """
    app = _AdminApp(
        title="imdsproxy admin API",
        version=version,
        description="Networks, instances and the state of one imdsproxy daemon.",
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.services = services
    app.include_router(daemon_routes.router)
    app.include_router(record_routes.router)
    app.add_exception_handler(ImdsproxyError, _told)
    app.add_exception_handler(RequestValidationError, _unacceptable)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(Exception, _internal)
    return app


async def _told(_request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, ImdsproxyError):  # only to tell the type checker what Starlette knows
        raise error
    return refusal(
        status_of(error), error.code, error.message, hint=error.hint, problems=error.problems
    )


async def _unacceptable(_request: Request, error: Exception) -> JSONResponse:
    found = error.errors() if isinstance(error, RequestValidationError) else []
    return refusal(
        422, "request-refused", "the request is not acceptable", problems=_problems(found)
    )


def _problems(found: Sequence[dict[str, object]]) -> list[Problem]:
    problems = []
    for each in found:
        location = each.get("loc", ())
        steps = [str(step) for step in location] if isinstance(location, tuple | list) else []
        field = ".".join(steps[1:]) or ".".join(steps)
        problems.append(Problem(field, str(each.get("msg", "is not acceptable"))))
    return problems


async def _no_route(request: Request, error: Exception) -> JSONResponse:
    status = error.status_code if isinstance(error, HTTPException) else 500
    message = f"{request.method} {request.url.path} is not part of this API"
    return refusal(
        status,
        _CODES.get(status, "request-refused"),
        message,
        hint="/openapi.json lists all routes",
    )


async def _internal(_request: Request, error: Exception) -> JSONResponse:
    return refusal(
        500,
        "internal",
        f"imdsproxy has a fault: {type(error).__name__}",
        hint="the daemon's log has the details; please report them",
    )
