"""Options that commands share, beside the run that they belong to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, TypeAlias

import typer

from imdsproxy.cli import completers
from imdsproxy.cli.flags import flag
from imdsproxy.cli.invocation import Invocation, invocation

__all__ = [
    "Address",
    "Config",
    "Invocation",
    "Json",
    "MaybeAddress",
    "MaybeNetwork",
    "Network",
    "Socket",
    "invocation",
]

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
_NETWORK: Final = flag(
    "--network", "NET", "The guest's network, by id or name.", completers.networks, "-n"
)
_ADDRESS: Final = flag("--from", "ADDRESS", "The guest's address.")
Network: TypeAlias = Annotated[str, _NETWORK]
Address: TypeAlias = Annotated[str, _ADDRESS]
MaybeNetwork: TypeAlias = Annotated[str | None, _NETWORK]
MaybeAddress: TypeAlias = Annotated[str | None, _ADDRESS]
