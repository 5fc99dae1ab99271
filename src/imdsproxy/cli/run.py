"""`imdsproxy run`: be the controller."""

from __future__ import annotations

import gc
import os

import typer

from imdsproxy.cli import options


def run(context: typer.Context, *, config: options.Config = None) -> None:
    """Be the controller: keep HAProxy and the documents in step with the sources, until stopped."""
    # Nothing that a start makes is garbage; to look for it takes 5 % of it. The controller enables it again.
    gc.disable()
    import imdsproxy.host.plain_structlog  # noqa: F401, PLC0415 - before all that logs
    from imdsproxy.controller import main  # noqa: PLC0415 - the other commands need not load it

    invocation = options.invocation(context, config=config)
    main.run(invocation.load, config=invocation.config, environment=dict(os.environ))
