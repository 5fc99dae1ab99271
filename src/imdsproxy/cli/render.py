"""`imdsproxy render`: the HAProxy configuration, nothing touched."""

from __future__ import annotations

import typer

from imdsproxy.cli import options


def render(
    context: typer.Context,
    *,
    as_json: options.Json = False,
    socket: options.Socket = None,
    config: options.Config = None,
) -> None:
    """HAProxy's configuration as it would be written now; nothing is touched."""
    run = options.invocation(context, as_json=as_json, socket=socket, config=config)
    text = str(run.daemon().get("/v1/haproxy-configuration"))
    if run.output.as_json:
        run.output.json({"haproxy_configuration": text})
    else:
        run.output.text(text)
