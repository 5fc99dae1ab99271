"""Small makers of typer options whose help needs no default."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

if TYPE_CHECKING:
    from typer.models import OptionInfo

__all__ = [
    "reshape",
    "Clear",
    "NoPathRules",
    "PathRules",
    "RecordFile",
    "SealUserData",
    "Tokens",
    "flag",
]


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


def reshape(
    command: Callable[..., None], *, without: Collection[str] = (), **annotations: object
) -> Callable[..., None]:
    """A command of which typer sees other annotations, and some parameters not at all: these keep their defaults."""
    signature = inspect.signature(command, eval_str=True)
    parameters = [
        one.replace(annotation=annotations.get(name, one.annotation))
        for name, one in signature.parameters.items()
        if name not in without
    ]

    def reshaped(*args: object, **kwargs: object) -> None:
        command(*args, **kwargs)

    vars(reshaped)["__signature__"] = signature.replace(parameters=parameters)
    return reshaped


RecordFile: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--file",
        "-f",
        metavar="FILE",
        help="Records in YAML or JSON (`networks:` and `instances:`); - is standard input.",
        show_default=False,
    ),
]
Clear: TypeAlias = Annotated[
    list[str] | None, flag("--clear", "KEY", "Clear a key, as user_data; may be repeated.")
]
Tokens: TypeAlias = Annotated[
    str | None,
    flag("--tokens", "off|optional|required", "Session tokens (IMDSv2) for the EC2 documents."),
]
SealUserData: TypeAlias = Annotated[
    bool | None,
    typer.Option(
        "--seal-user-data/--no-seal-user-data",
        help="Refuse user data once the boot is over, or do not although a wider policy says so.",
        show_default=False,
    ),
]
PathRules: TypeAlias = Annotated[
    list[str] | None,
    flag(
        "--path-rule",
        "PATH=deny|allow|required|optional",
        "What is said of a path and what is beneath it, as /latest/user-data=deny; may be repeated.",
    ),
]
NoPathRules: TypeAlias = Annotated[
    list[str] | None,
    flag("--no-path-rule", "PATH", "Say nothing of a path any more; may be repeated."),
]
