"""Options that commands share, and what they lead to: settings, the daemon, the way to say things."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from imdsproxy.cli import completers
from imdsproxy.cli.output import Output

if TYPE_CHECKING:
    from imdsproxy.cli.admin_client import AdminClient
    from imdsproxy.config.load import Loaded
    from imdsproxy.config.schema import Settings

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


@dataclass(slots=True)
class Invocation:
    """One run of the command line: what was asked for before and after the command's name."""

    config: Path | None = None
    socket: Path | None = None
    output: Output = field(default_factory=Output)

    def load(self) -> Loaded:
        """The settings; `ConfigError` with every problem."""
        from imdsproxy.config.load import load_settings  # noqa: PLC0415 - `--help` need not load it

        return load_settings(self.config, os.environ)

    @property
    def settings(self) -> Settings:
        """The settings; `ConfigError` with every problem."""
        return self.load().settings

    def daemon(self) -> AdminClient:
        """The daemon, by the socket that was named or that the settings name."""
        from imdsproxy.cli.admin_client import AdminClient  # noqa: PLC0415 - as above

        return AdminClient(self.socket or self.settings.admin_socket)


def invocation(
    context: typer.Context,
    *,
    as_json: bool = False,
    config: Path | None = None,
    socket: Path | None = None,
) -> Invocation:
    """What was asked for, options after the command's name winning over those before it."""
    root = context.find_root()
    run = root.obj if isinstance(root.obj, Invocation) else Invocation()
    run.config = config or run.config
    run.socket = socket or run.socket
    run.output.as_json = as_json or run.output.as_json
    return run
