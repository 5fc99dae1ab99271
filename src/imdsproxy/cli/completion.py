"""`imdsproxy completion`: what a shell needs to complete our command lines, and what it then asks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Final

import typer

from imdsproxy.cli import options

if TYPE_CHECKING:
    from collections.abc import Sequence

_PROGRAM: Final = "imdsproxy"
_VARIABLE: Final = "_IMDSPROXY_COMPLETE"
SHELLS: Final = ("bash", "zsh", "fish")

Shell = Annotated[str, typer.Argument(metavar="|".join(SHELLS), help="For which shell.")]


def completion(context: typer.Context, shell: Shell) -> None:
    """The script with which a shell completes commands, options, and the names of networks and instances."""
    from imdsproxy.errors import RequestRefused  # noqa: PLC0415 - `--help` need not load it

    if shell not in SHELLS:
        raise RequestRefused(f"there is no script for {shell}", hint=f"one of {', '.join(SHELLS)}")
    options.invocation(context).output.text(render_completion(shell))


def render_completion(shell: str) -> str:
    """That script, for one of `SHELLS`."""
    import typer.completion  # noqa: PLC0415 - `--help` need not load it

    make = getattr(typer.completion, "get_completion_script")  # noqa: B009 - not in its list
    return f"{make(prog_name=_PROGRAM, complete_var=_VARIABLE, shell=shell)}\n"


def is_completing(environment: Mapping[str, str]) -> bool:
    """Whether a shell's script asks for words, and no command is to be run."""
    return _VARIABLE in environment


def learn_shells() -> None:
    """Have typer know how each shell asks, and wants to be answered."""
    import typer.completion  # noqa: PLC0415 - only a shell needs it

    getattr(typer.completion, "completion_init")()  # noqa: B009 - not in its list


def words_so_far(environment: Mapping[str, str]) -> Sequence[str]:
    """The words of the line that is completed, without the program's name and the word that is begun."""
    line = environment.get("_TYPER_COMPLETE_ARGS") or environment.get("COMP_WORDS", "")
    return line.split()[1:] if line[-1:].isspace() else line.split()[1:-1]
