"""`imdsproxy version`."""

from __future__ import annotations

import typer

from imdsproxy import __version__
from imdsproxy.cli import options


def version(context: typer.Context, *, as_json: options.Json = False) -> None:
    """The version of this program."""
    run = options.invocation(context, as_json=as_json)
    if run.output.as_json:
        run.output.json({"version": __version__})
    else:
        run.output.text(f"imdsproxy {__version__}")
