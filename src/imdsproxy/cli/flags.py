"""Small makers of typer options whose help needs no default."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from imdsproxy.core.path_rules import PathWord
from imdsproxy.core.policy import RULES, Rule, TokenMode

if TYPE_CHECKING:
    from typer.models import OptionInfo

__all__ = [
    "reshape",
    "Clear",
    "RecordFile",
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
    """A command of which typer sees other annotations, and some parameters not at all: these keep their defaults.

    In the place of `**rules` typer sees a flag for each rule of a policy.
    """
    signature = inspect.signature(command, eval_str=True)
    parameters: list[inspect.Parameter] = []
    for name, one in signature.parameters.items():
        if one.kind is inspect.Parameter.VAR_KEYWORD:
            parameters += _policy_parameters()
        elif name not in without:
            parameters.append(one.replace(annotation=annotations.get(name, one.annotation)))

    def reshaped(*args: object, **kwargs: object) -> None:
        command(*args, **kwargs)

    vars(reshaped)["__signature__"] = signature.replace(parameters=parameters)
    return reshaped


def _policy_parameters() -> list[inspect.Parameter]:
    annotations: dict[str, object] = {
        rule.name: _annotation(rule) for rule in RULES.values() if rule.kind is not tuple
    }
    annotations["path_rule"] = Annotated[
        list[str] | None,
        flag(
            "--path-rule",
            f"PATH={'|'.join(PathWord)}",
            "Set a rule for a path and what is beneath it, as /latest/user-data=deny; may be repeated.",
        ),
    ]
    annotations["no_path_rule"] = Annotated[
        list[str] | None,
        flag("--no-path-rule", "PATH", "Remove the rule for a path; may be repeated."),
    ]
    return [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in annotations.items()
    ]


def _annotation(rule: Rule) -> object:
    name, text = rule.name.replace("_", "-"), rule.summary.replace("`", "")
    if rule.kind is bool:
        option = typer.Option(f"--{name}/--no-{name}", help=text, show_default=False)
        return Annotated[bool | None, option]
    if rule.bounds is None:
        return Annotated[str | None, flag(f"--{name}", "|".join(TokenMode), text)]
    least, most = rule.bounds
    return Annotated[int | None, flag(f"--{name}", f"{least}..{most}", text)]


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
