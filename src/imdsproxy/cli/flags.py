"""Small makers of typer options whose help needs no default."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

if TYPE_CHECKING:
    from typer.models import OptionInfo

__all__ = [
    "Clear",
    "NoPathRules",
    "PathRules",
    "RecordFile",
    "SealUserData",
    "Tokens",
    "flag",
]


def flag(
    name: str, metavar: str, help_text: str, complete: Callable[..., list[str]] | None = None
) -> OptionInfo:
    """An option with a value; without it the record's key stays as it is.

    Args:
        name: With its hyphens.
        metavar: What stands for the value in the help.
        help_text: What it is.
        complete: What a shell may complete it to (`imdsproxy.cli.completers`).
    """
    option: OptionInfo = typer.Option(
        name, metavar=metavar, help=help_text, show_default=False, autocompletion=complete
    )
    return option


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
    list[str] | None, flag("--clear", "KEY", "Take a key away, as user_data; may be repeated.")
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
