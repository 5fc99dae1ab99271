"""`imdsproxy stop`: end the controller, or everything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, TypeAlias, cast

import typer

from imdsproxy.cli import options

__all__ = ["stop"]

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
    body = {"data_plane": data_plane}
    answer = cast(
        "Mapping[str, Sequence[str]]", run.daemon().request("POST", "/v1/stop", body=body)
    )
    if run.output.as_json:
        run.output.json(answer)
    else:
        run.output.text(f"stopping: {', '.join(answer['stopping'])}")
