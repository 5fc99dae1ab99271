"""The admin API: an ASGI application over the controller's parts, described by its own OpenAPI document.

It is served on a unix socket only, whose mode and owner say who may use it. Every answer from 400
up is one `ProblemBody` (RFC 9457).
"""

from fastapi import FastAPI

from imdsproxy.admin.problems import ERRORS, new_app
from imdsproxy.admin.routes import router
from imdsproxy.controller.controller import Controller


def admin_app(controller: Controller | None) -> FastAPI:
    """The application; `/openapi.json` describes it, `/v1/…` are its routes.

    Args:
        controller: What its routes use; `None` where it is only described.
    """
    app = new_app(
        "imdsproxy admin API", "Networks, instances and the state of one imdsproxy daemon."
    )
    app.state.controller = controller
    app.include_router(router, prefix="/v1", responses=ERRORS)
    return app
