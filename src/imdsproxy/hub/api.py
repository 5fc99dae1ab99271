"""What a hub answers behind HAProxy, except streams: routes of operators, hosts and other hubs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import FastAPI

if TYPE_CHECKING:
    from imdsproxy.hub.hub import Hub


def build_api(hub: Hub) -> FastAPI:
    """The application."""
    app = FastAPI(title="imdsproxy hub", docs_url=None, redoc_url=None)
    app.state.hub = hub
    return app
