"""Options that commands share, beside the run that they belong to."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
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
    "command",
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
