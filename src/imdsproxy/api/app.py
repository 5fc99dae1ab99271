"""The admin API: an ASGI application over the controller's parts, described by its own OpenAPI document.

The API is served on a unix socket only, whose mode and owner decide who may use it. Every answer from 400 up is one
`ProblemBody` (RFC 9457).
"""

from fastapi import FastAPI

from imdsproxy.api.problems import ERRORS, new_app
from imdsproxy.api.routes import router
from imdsproxy.controller.parts import Parts


def admin_app(parts: Parts | None) -> FastAPI:
    """Build the application; its routes are `/v1/…`, and `/openapi.json` describes it.

    Args:
        parts: The parts that its routes use; `None` only to describe the application.
    """
    app = new_app(
        "imdsproxy admin API", "Networks, instances and the state of one imdsproxy daemon."
    )
    app.state.parts = parts
    app.include_router(router, prefix="/v1", responses=ERRORS)
    return app
