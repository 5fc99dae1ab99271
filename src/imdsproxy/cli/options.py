"""Options that commands share, beside the run that they belong to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from imdsproxy.cli import completers
from imdsproxy.cli.invocation import Invocation, invocation

__all__ = ["Address", "Config", "Invocation", "Json", "Network", "Socket", "invocation"]

Config: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        metavar="FILE",
        help="Settings; /etc/imdsproxy/imdsproxy.yaml without it.",
        show_default=False,
    ),
]
Socket: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--socket",
        "-s",
        metavar="PATH",
        help="The daemon's admin socket; the settings name it otherwise.",
        show_default=False,
    ),
]
Json: TypeAlias = Annotated[
    bool, typer.Option("--json", help="Say it in JSON, for programs.", show_default=False)
]
Network: TypeAlias = Annotated[
    str,
    typer.Option(
        "--network",
        "-n",
        metavar="NET",
        help="The network that the guest sits in.",
        autocompletion=completers.networks,
    ),
]
Address: TypeAlias = Annotated[
    str, typer.Option("--from", metavar="ADDRESS", help="The guest's address.")
]
