"""A small maker of typer options whose help needs no default."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from typer.models import OptionInfo


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
