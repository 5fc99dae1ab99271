"""One run of the command line: what it leads to, settings, the daemon and the way to say things."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from imdsproxy.cli.output import Output

if TYPE_CHECKING:
    import typer

    from imdsproxy.cli.admin_client import AdminClient
    from imdsproxy.config.load import Loaded
    from imdsproxy.config.schema import Settings


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
