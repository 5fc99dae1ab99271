"""`imdsproxy render`: the HAProxy configuration, nothing touched."""

from __future__ import annotations

from imdsproxy.cli import options


@options.command
def render(
    run: options.Invocation,
) -> None:
    """HAProxy's configuration as it would be written now; nothing is touched."""
    text = str(run.daemon().get("/v1/haproxy-configuration"))
    if run.output.as_json:
        run.output.json({"haproxy_configuration": text})
    else:
        run.output.text(text)
