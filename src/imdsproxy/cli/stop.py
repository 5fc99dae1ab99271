"""`imdsproxy stop`: end the controller, or everything."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Final, TypeAlias, cast

import typer

from imdsproxy.cli import options
from imdsproxy.errors import AdminUnavailable

__all__ = ["stop"]

_END_DEADLINE_S: Final = 40.0
_POLL_S: Final = 0.02

DataPlane: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--data-plane",
        help="End HAProxy and the document server too: guests get no answer.",
        show_default=False,
    ),
]


def stop(
    context: typer.Context,
    *,
    data_plane: DataPlane = False,
    as_json: options.Json = False,
    socket: options.Socket = None,
    config: options.Config = None,
) -> None:
    """End the controller; known guests are served on. With --data-plane, end everything."""
    run = options.invocation(context, as_json=as_json, socket=socket, config=config)
    try:
        body = {"data_plane": data_plane}
        answer = cast(
            "Mapping[str, Sequence[str]]", run.daemon().request("POST", "/v1/stop", body=body)
        )
        stopped = list(answer["stopping"])
        _wait_until_gone(run.daemon().socket)
    except AdminUnavailable:
        # A dead controller is no reason to leave what it left running.
        if not data_plane:
            raise
        stopped = []
    if data_plane:
        from imdsproxy.app.stop import stop_data_plane  # noqa: PLC0415 - the others need not load it

        asyncio.run(stop_data_plane(run.settings, os.environ))
    if run.output.as_json:
        run.output.json({"stopped": stopped, "data_plane": data_plane})
    else:
        run.output.text(f"stopped: {', '.join(stopped) or 'the data plane; no controller ran'}")


def _wait_until_gone(path: Path) -> None:
    """Until the daemon has taken its socket away, or for as long as its end may take."""
    deadline = time.monotonic() + _END_DEADLINE_S
    while path.exists() and time.monotonic() < deadline:
        time.sleep(_POLL_S)
