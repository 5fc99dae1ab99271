"""Main program of the command line: loads commands by module, reports errors as one line and an exit status.

`_Program` imports only the module of the given command: importing all modules takes half as long as `imdsproxy run`
takes to find its settings.
"""

import importlib
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Annotated, Any, Final

from imdsproxy import __version__
from imdsproxy.errors import ImdsproxyError, RequestRefused, hidden_library

# Debian 13's typer imports rich, which takes half of a short command's time: `_show_help_with_rich` does so for help.
with hidden_library("rich"):
    import typer
    import typer.core
    import typer.main

    from imdsproxy.cli import options
    from imdsproxy.cli.output import Output

try:  # new typer versions bundle click; Debian 13's typer 0.15 uses the class of the package click
    from typer import TyperException as CommandLineError
except ImportError:
    from click import ClickException as CommandLineError  # type: ignore[assignment] # of one shape

_VARIABLE: Final = "_IMDSPROXY_COMPLETE"
SHELLS: Final = ("bash", "zsh", "fish")

EXAMPLES: Final = dict(
    line.split(": ", 1)
    for line in Path(__file__).with_name("examples.txt").read_text("utf-8").splitlines()
)
"""Example of each command, by command path, for help, reference and manual page."""

COMMANDS: Final = tuple(dict.fromkeys(path.split()[0] for path in EXAMPLES))
"""Commands, in the order of the help.

A command is a function of the same name, in a module of the same name or in its module of `_MODULES`. A group of
commands is `NAME_app` there.
"""

_GROUPS: Final = frozenset(path.split()[0] for path in EXAMPLES if " " in path)
_MODULES: Final[Mapping[str, str]] = {
    **dict.fromkeys(
        (
            *("run", "documents", "identity-server", "signer", "hub", "namespace-proxy"),
            *("libvirt-hook", "check", "bundle"),
            *("render", "reload", "stop", "version"),
        ),
        "daemon",
    ),
    **dict.fromkeys(("network", "instance"), "records"),
    "grant": "policy",
    "console": "status",
    "snippet": "doctor",
    **dict.fromkeys(("get", "explain", "watch", "token"), "guests"),
    **dict.fromkeys(("takeover", "handback"), "takeover"),
    "completion": "main",
}
_PANELS: Final[Mapping[str, str]] = {
    "identity": "Guests",
    **dict.fromkeys(("network", "instance", "policy", "grant"), "Records"),
    **dict.fromkeys(("get", "explain", "watch", "token", "doctor", "snippet"), "Guests"),
    **dict.fromkeys(("fleet", "libvirt-hook"), "Fleet"),
}
"""Headings of the help, by command; other commands belong to the heading Daemon."""

_OTHERS_WORDS: Final = {
    "ignore_unknown_options": True,
    "allow_interspersed_args": False,
    "help_option_names": [],
}
"""Context settings that pass all arguments through to another program, including --help."""

_ALSO: Final[Mapping[str, str]] = {"tokens": "token"}
"""Aliases of commands; the help does not show aliases."""

_UNKNOWN: Final = re.compile(r"No such (command|option):? '?([^' ]+?)'?(?:[. ]|$)")
_MEANT: Final[Mapping[str, str]] = {
    **dict.fromkeys(("delete", "del", "rm", "destroy"), "remove"),
    **dict.fromkeys(("create", "new", "define"), "add"),
    **dict.fromkeys(("update", "edit", "change", "modify"), "set"),
    **dict.fromkeys(("get", "info", "describe", "inspect"), "show"),
    "ls": "list",
    "start": "run",
    "networks": "network",
    "instances": "instance",
}
"""Our commands, by their names in other programs; used for suggestions."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; return its exit status (`imdsproxy.cli.options`)."""
    if arguments is None and _VARIABLE in os.environ:
        return _complete()
    invocation = options.Invocation(output=Output())
    try:
        return _run(list(sys.argv[1:] if arguments is None else arguments), invocation)
    except ImdsproxyError as error:
        invocation.output.error(error)
        return error.exit_status
    except KeyboardInterrupt:
        return options.INTERRUPTED
    except (BrokenPipeError, SystemExit):
        # Outside standalone mode, typer raises SystemExit only for a closed pipe. Python flushes standard output again
        # at exit, which would print an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return options.PIPE_CLOSED


def _complete() -> int:
    """Print completions for a shell; typer reads the command line from the environment."""
    import typer.completion

    # Registers the completion protocol of each shell.
    getattr(typer.completion, "completion_init")()  # noqa: B009 - not in its list
    try:
        build_program()([], prog_name="imdsproxy")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else options.USAGE
    return options.OK


def _run(arguments: list[str], invocation: options.Invocation) -> int:
    program = build_program()
    try:
        ended = program(arguments, prog_name="imdsproxy", standalone_mode=False, obj=invocation)
        sys.stdout.flush()
    except typer.Abort as error:
        raise KeyboardInterrupt from error
    except CommandLineError as error:
        return _usage(error, invocation)
    if not arguments:  # click 8.1 prints the help and reports success
        return options.USAGE
    return ended if isinstance(ended, int) else options.OK


def _usage(error: CommandLineError, invocation: options.Invocation) -> int:
    message = error.format_message()
    if not message or type(error).__name__ == "NoArgsIsHelpError":
        sys.stderr.write(f"{message}\n")
        return options.USAGE
    context = getattr(error, "ctx", None)
    path = "imdsproxy" if context is None else context.command_path
    hint = f"see `{path} --help`"
    # typer's list of valid values contains line breaks and tabs.
    message = " ".join(message.split())
    if (unknown := _UNKNOWN.match(message)) is not None and context is not None:
        kind, word = unknown.groups()
        message = f"there is no {kind} {word}"
        meant = _find_meant(context.command, kind, word)
        if meant:
            lead = f"{path} " if kind == "command" else ""
            hint = f"did you mean {' or '.join(f'`{lead}{one}`' for one in meant)}?"
    invocation.output.error(RequestRefused(message, hint=hint))
    return options.USAGE


def _find_meant(command: Any, kind: str, word: str) -> list[str]:
    """Return commands or options with a name similar to an unknown one, the likeliest first."""
    if kind == "option":
        known = [name for one in command.params for name in (*one.opts, *one.secondary_opts)]
        return _similar(word, [name for name in known if name.startswith("--")])
    known = command.list_commands(None)
    meant = _MEANT.get(word, word)
    if meant in known:
        return [meant]
    of_records = [f"{group} {meant}" for group in ("network", "instance")]
    if command.name == "imdsproxy" and set(of_records) <= EXAMPLES.keys():
        return of_records
    return _similar(word, known)


def _similar(word: str, known: Sequence[str]) -> list[str]:
    import difflib

    return difflib.get_close_matches(word, known, n=1)


def _show_version(wanted: bool) -> None:  # noqa: FBT001 - typer passes it so
    if wanted:
        sys.stdout.write(f"imdsproxy {__version__}\n")
        raise typer.Exit


def _root(
    context: typer.Context,
    *,
    config: options.Config = None,
    socket: options.Socket = None,
    as_json: options.Json = False,
    fleet: options.Fleet = None,
    fleet_certificate: options.Certificate = None,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Show the version of this program.",
            show_default=False,
            metavar="",
            is_eager=True,
            callback=_show_version,
        ),
    ] = False,
) -> None:
    del version
    options.invocation(
        context,
        config=config,
        socket=socket,
        as_json=as_json,
        fleet=fleet,
        fleet_certificate=fleet_certificate,
    )


class _Program(typer.core.TyperGroup):
    """Root command that imports a command's module on lookup."""

    def list_commands(self, _context: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, _context: Any, cmd_name: str) -> Any:
        """Return the command of a name; for an unknown name load all commands, because typer searches a similar one."""
        meant = _ALSO.get(cmd_name, cmd_name)
        for name in [meant] if meant in COMMANDS else COMMANDS:
            if name not in self.commands:
                self.commands[name] = _load_command(name)
        return self.commands.get(meant)


def _load_command(name: str) -> Any:
    """Import a command; add examples to its help and to the help of its subcommands."""
    identifier = name.replace("-", "_")
    module = importlib.import_module(f"imdsproxy.cli.{_MODULES.get(name, identifier)}")
    panel = _PANELS.get(name, "Daemon")
    app = typer.Typer()
    if name in _GROUPS:
        app.add_typer(getattr(module, f"{name}_app"), name=name, rich_help_panel=panel)
    else:
        settings = _OTHERS_WORDS if name == "namespace-proxy" else None
        app.command(name, context_settings=settings, rich_help_panel=panel)(
            getattr(module, identifier)
        )
    command = typer.main.get_group(app).commands[name]
    for path, each in iterate_commands(command, name):
        each.epilog = _example(path)
        _prepare_help(each)
        for parameter in each.params:
            if parameter.param_type_name == "argument":
                _show_as_written(parameter)
    return command


def _example(path: str) -> str:
    """Return a command's example; for a group, the example of its first command."""
    words = (words for name, words in EXAMPLES.items() if f"{name} ".startswith(f"{path} "))
    return f"Example: {next(words)}"


def build_program() -> Any:
    app = typer.Typer(
        name="imdsproxy",
        cls=_Program,
        help="Metadata for every instance at http://169.254.169.254, in every network of this host.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="rich",
        epilog=_example("network add"),
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(no_args_is_help=True)(_root)
    program = typer.main.get_group(app)
    _prepare_help(program)
    return program


def iterate_commands(command: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield a command and its subcommands with their command paths, as `network add`; the root's path is empty."""
    yield path, command
    for name in command.list_commands(None) if hasattr(command, "list_commands") else ():
        yield from iterate_commands(command.get_command(None, name), f"{path} {name}".strip())


def _show_as_written(argument: Any) -> None:
    argument.get_usage_pieces = lambda *_, **_ignored: [argument.metavar]
    argument.display_type_rich = lambda *_, **_ignored: None
    if hasattr(argument, "type"):
        # Debian 13's typer shows the type's name if the argument has its own metavar.
        argument.type = copy(argument.type)
        argument.type.name = argument.metavar


def _prepare_help(command: Any) -> None:
    _show_help_with_rich(command)
    make_help_option = command.get_help_option

    def help_option(context: typer.Context) -> Any:
        option = make_help_option(context)
        if option is not None:
            option.metavar = ""
        return option

    command.get_help_option = help_option


def _show_help_with_rich(command: Any) -> None:
    format_help = command.format_help

    def format_with_rich(context: Any, formatter: Any) -> None:
        core: Any = typer.core
        if getattr(core, "rich", command) is None:
            import rich
            from typer import rich_utils

            core.rich, core.rich_utils = rich, rich_utils
        format_help(context, formatter)

    command.format_help = format_with_rich


@options.bare_command
def completion(
    run: options.Invocation,
    shell: Annotated[str, options.argument("|".join(SHELLS), "The shell that runs the script.")],
) -> None:
    """Print the script that lets a shell complete commands, options, and names of networks and instances."""
    if shell not in SHELLS:
        raise RequestRefused(f"there is no script for {shell}", hint=f"one of {', '.join(SHELLS)}")
    run.output.text(render_completion(shell))


def render_completion(shell: str) -> str:
    """Return the completion script for one of `SHELLS`."""
    import typer.completion

    make = getattr(typer.completion, "get_completion_script")  # noqa: B009 - not in its list
    return f"{make(prog_name='imdsproxy', complete_var=_VARIABLE, shell=shell)}\n"
