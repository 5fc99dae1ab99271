"""What commands share: their options, and one run with its settings, daemon and output."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, TypeAlias

import typer

from imdsproxy.cli import completers
from imdsproxy.cli.output import Output

if TYPE_CHECKING:
    from typer.models import OptionInfo

    from imdsproxy.cli.admin_client import AdminClient
    from imdsproxy.config.load import Loaded
    from imdsproxy.config.schema import Settings


def flag(
    name: str,
    metavar: str,
    help_text: str,
    complete: Callable[..., list[str]] | None = None,
    short: str | None = None,
) -> OptionInfo:
    """An option with a value; without it the record's key stays as it is.

    Args:
        name: With its hyphens.
        metavar: What stands for the value in the help.
        help_text: What it is.
        complete: What a shell may complete it to (`imdsproxy.cli.completers`).
        short: Another name, of one letter.
    """
    option: OptionInfo = typer.Option(
        *((name,) if short is None else (name, short)),
        metavar=metavar,
        help=help_text,
        show_default=False,
        autocompletion=complete,
    )
    return option


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
    bool, typer.Option("--json", help="Print JSON, for programs.", show_default=False)
]
_NETWORK: Final = flag(
    "--network", "NET", "The guest's network, by id or name.", completers.networks, "-n"
)
_ADDRESS: Final = flag("--from", "ADDRESS", "The guest's address.")
Network: TypeAlias = Annotated[str, _NETWORK]
Address: TypeAlias = Annotated[str, _ADDRESS]
MaybeNetwork: TypeAlias = Annotated[str | None, _NETWORK]
MaybeAddress: TypeAlias = Annotated[str | None, _ADDRESS]


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


def command(
    function: Callable[..., None],
    flags: Mapping[str, object] | None = None,
    **annotations: object,
) -> Callable[..., None]:
    """A function of an `Invocation` as a command: in its place typer sees --json, --socket and --config.

    Args:
        function: Its first parameter is the invocation.
        flags: Annotations of what typer sees in the place of `**values`, by name. Their default is `None`.
        annotations: Of parameters that are described in another way than the function does.
    """
    signature = inspect.signature(function, eval_str=True)
    shared = {"as_json": (Json, False), "socket": (Socket, None), "config": (Config, None)}
    parameters = [
        inspect.Parameter(
            "context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context
        )
    ]
    for one in list(signature.parameters.values())[1:]:
        if one.kind is inspect.Parameter.VAR_KEYWORD:
            parameters += [_keyword(name, kind, None) for name, kind in (flags or {}).items()]
        else:
            parameters.append(one.replace(annotation=annotations.get(one.name, one.annotation)))
    parameters += [_keyword(name, *kind) for name, kind in shared.items()]

    def run(
        context: typer.Context,
        *,
        as_json: bool,
        socket: Path | None,
        config: Path | None,
        **values: object,
    ) -> None:
        function(invocation(context, as_json=as_json, socket=socket, config=config), **values)

    run.__name__, run.__doc__ = function.__name__, function.__doc__
    vars(run)["__signature__"] = signature.replace(parameters=parameters, return_annotation=None)
    return run


def _keyword(name: str, annotation: object, default: object) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )
