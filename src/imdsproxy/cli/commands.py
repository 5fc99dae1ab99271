"""The commands, each with the module that has it: only what a command line names is loaded.

All of them take half as long to load as `imdsproxy run` takes to find its settings, and each command would wait for
all of them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Final, TypeAlias

import typer
import typer.main

from imdsproxy import __version__
from imdsproxy.cli import options
from imdsproxy.cli.examples import EXAMPLES

_DAEMON, _GUESTS, _RECORDS = "Daemon", "Guests", "Records"

COMMANDS: Final[Mapping[str, str]] = {
    "run": _DAEMON,
    "documents": _DAEMON,
    "check": _DAEMON,
    "status": _DAEMON,
    "reload": _DAEMON,
    "stop": _DAEMON,
    "render": _DAEMON,
    "config": _DAEMON,
    "version": _DAEMON,
    "completion": _DAEMON,
    "network": _RECORDS,
    "instance": _RECORDS,
    "namespace-proxy": _DAEMON,
    "get": _GUESTS,
    "explain": _GUESTS,
    "watch": _GUESTS,
    "token": _GUESTS,
    "doctor": _GUESTS,
    "snippet": _GUESTS,
}
"""Every command, in the order of the help, and under which heading it stands there.

A command is a function of its module, both named as it is; a group of commands is its module's `app`.
"""

_GROUPS: Final = frozenset({"config", "network", "instance", "token"})
_ALSO: Final[Mapping[str, str]] = {"tokens": "token"}
"""What people write who do not remember which of the two it is. It is there when it is named, and in no help."""

_WITH_VALUE: Final = frozenset({"--config", "-c", "--socket", "-s"})


def _show_version(wanted: bool) -> None:  # noqa: FBT001 - typer passes it so
    if wanted:
        sys.stdout.write(f"imdsproxy {__version__}\n")
        raise typer.Exit


Version: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--version",
        help="The version of this program.",
        show_default=False,
        is_eager=True,
        callback=_show_version,
    ),
]


def _root(
    context: typer.Context,
    *,
    config: options.Config = None,
    socket: options.Socket = None,
    as_json: options.Json = False,
    version: Version = False,
) -> None:
    del version
    options.invocation(context, config=config, socket=socket, as_json=as_json)


def build_app(names: Iterable[str] = COMMANDS) -> typer.Typer:
    """The program with these commands; the others are not known to it."""
    app = typer.Typer(
        name="imdsproxy",
        help="Metadata for every instance at http://169.254.169.254, in every network of this host.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(no_args_is_help=True)(_root)
    for name in names:
        identifier = name.replace("-", "_")
        module = importlib.import_module(f"imdsproxy.cli.{identifier}")
        if name in _GROUPS:
            app.add_typer(module.app, name=name, rich_help_panel=COMMANDS[name])
            if names is not COMMANDS:
                for also in (word for word, meant in _ALSO.items() if meant == name):
                    app.add_typer(module.app, name=also, hidden=True)
        else:
            settings = getattr(module, "SETTINGS", None)
            app.command(name, context_settings=settings, rich_help_panel=COMMANDS[name])(
                getattr(module, identifier)
            )
    return app


def build_program(names: Iterable[str] = COMMANDS) -> Any:  # noqa: ANN401 - typer keeps its command classes private
    """The same as the command that is run, with an example in each command's help."""
    program = typer.main.get_command(build_app(names))
    for path, command in iterate_commands(program):
        example = EXAMPLES.get(path)
        if example is not None:
            command.epilog = f"Example: {example}"
        _hide_types_of_switches(command)
    return program


def iterate_commands(command: Any, path: str = "") -> Iterator[tuple[str, Any]]:  # noqa: ANN401 - as above
    """A command and those inside it, each with what calls it: `network add`, and nothing for the first."""
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from iterate_commands(inner, f"{path} {name}".strip())


def _hide_types_of_switches(command: Any) -> None:  # noqa: ANN401 - as above
    for parameter in command.params:
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
    make_help_option = command.get_help_option

    def help_option(context: typer.Context) -> Any:  # noqa: ANN401 - as above
        option = make_help_option(context)
        if option is not None:
            option.metavar = ""
        return option

    command.get_help_option = help_option


def named_command(arguments: Sequence[str]) -> str | None:
    """The command that a command line names; `None` where it names none that there is, or asks for help."""
    waiting = iter(arguments)
    for word in waiting:
        if word in _WITH_VALUE:
            next(waiting, None)
        elif not word.startswith("-"):
            meant = _ALSO.get(word, word)
            return meant if meant in COMMANDS else None
        elif word in {"--", "-h", "--help", "--version"}:
            return None
    return None
