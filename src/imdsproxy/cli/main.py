"""The command line: one program, one command a module, errors as one clear line and an exit status."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Final

import typer

from imdsproxy.cli import exitcodes, options
from imdsproxy.cli.commands import COMMANDS, build_app, build_program, named_command
from imdsproxy.cli.completion import is_completing, learn_shells, words_so_far
from imdsproxy.cli.output import Output
from imdsproxy.errors import ImdsproxyError, RequestRefused

try:  # typer has an error class of its own since it brings its own click; click's with Debian 13's 0.15
    from typer import TyperException as CommandLineError
except ImportError:
    from click import ClickException as CommandLineError  # type: ignore[assignment] # of one shape

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
"""What other programs call our commands."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and give its exit status (`imdsproxy.cli.exitcodes`).

    Args:
        arguments: Without the program's name; `None` takes this process's own.
    """
    if arguments is None and is_completing(os.environ):
        return _complete()
    invocation = options.Invocation(output=Output())
    try:
        return _run(list(sys.argv[1:] if arguments is None else arguments), invocation)
    except ImdsproxyError as error:
        invocation.output.error(error)
        return error.exit_status
    except KeyboardInterrupt:
        return exitcodes.INTERRUPTED
    except (BrokenPipeError, SystemExit):
        # typer makes a SystemExit of a closed pipe, and of nothing else when it is not standalone.
        # Python flushes standard output once more at its end, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return exitcodes.PIPE_CLOSED


def _complete() -> int:
    """Answer a shell that asks for words; the environment has the line, and typer reads it there."""
    learn_shells()
    named = named_command(words_so_far(os.environ))
    app = build_app(COMMANDS if named is None else (named,))
    try:
        app([], prog_name="imdsproxy")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else exitcodes.USAGE
    return exitcodes.OK


def _run(arguments: list[str], invocation: options.Invocation) -> int:
    named = named_command(arguments)
    program = build_program(COMMANDS if named is None else (named,))
    try:
        ended = program(arguments, prog_name="imdsproxy", standalone_mode=False, obj=invocation)
        sys.stdout.flush()
    except typer.Abort as error:
        raise KeyboardInterrupt from error
    except CommandLineError as error:
        return _usage(error, invocation)
    if not arguments:  # click 8.1 calls the help that it gives then a success
        return exitcodes.USAGE
    return ended if isinstance(ended, int) else exitcodes.OK


def _usage(error: CommandLineError, invocation: options.Invocation) -> int:
    message = error.format_message()
    if not message or type(error).__name__ == "NoArgsIsHelpError":
        sys.stderr.write(f"{message}\n")
        return exitcodes.USAGE
    context = getattr(error, "ctx", None)
    command = "imdsproxy" if context is None else context.command_path
    hint = f"`{command} --help` says what it takes"
    unknown = re.search("No such command '([^']+)'", message)
    known = getattr(getattr(context, "command", None), "commands", {})
    meant = None if unknown is None else _MEANT.get(unknown[1])
    if meant in known:
        hint = f"did you mean `{command} {meant}`?"
    # The list of what an option may be comes with line breaks and tabs.
    message = " ".join(message.split())
    invocation.output.error(RequestRefused(message, hint=hint))
    return exitcodes.USAGE
