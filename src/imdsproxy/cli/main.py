"""The command line: one program, one command a module, errors as one clear line and an exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import typer

from imdsproxy.cli import (
    check,
    config,
    doctor,
    documents,
    exitcodes,
    explain,
    get,
    instance,
    namespace_proxy,
    network,
    options,
    reload,
    render,
    run,
    snippet,
    status,
    stop,
    version,
)
from imdsproxy.cli.command_line_error import CommandLineError
from imdsproxy.cli.output import Output
from imdsproxy.errors import ImdsproxyError, RequestRefused

__all__ = ["app", "main"]

app = typer.Typer(
    name="imdsproxy",
    help="Metadata for every instance at http://169.254.169.254, in every network of this host.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(no_args_is_help=True)
def _root(
    context: typer.Context,
    *,
    config: options.Config = None,
    socket: options.Socket = None,
    as_json: options.Json = False,
) -> None:
    options.invocation(context, config=config, socket=socket, as_json=as_json)


_DAEMON, _GUESTS, _RECORDS = "Daemon", "Guests", "Records"

app.command("run", rich_help_panel=_DAEMON)(run.run)
app.command("documents", rich_help_panel=_DAEMON)(documents.documents)
app.command("check", rich_help_panel=_DAEMON)(check.check)
app.command("status", rich_help_panel=_DAEMON)(status.status)
app.command("reload", rich_help_panel=_DAEMON)(reload.reload)
app.command("stop", rich_help_panel=_DAEMON)(stop.stop)
app.command("render", rich_help_panel=_DAEMON)(render.render)
app.add_typer(config.app, name="config", rich_help_panel=_DAEMON)
app.command("version", rich_help_panel=_DAEMON)(version.version)
app.add_typer(network.app, name="network", rich_help_panel=_RECORDS)
app.add_typer(instance.app, name="instance", rich_help_panel=_RECORDS)
app.command("namespace-proxy", context_settings=namespace_proxy.SETTINGS, rich_help_panel=_DAEMON)(
    namespace_proxy.namespace_proxy
)
app.command("get", rich_help_panel=_GUESTS)(get.get)
app.command("explain", rich_help_panel=_GUESTS)(explain.explain)
app.command("doctor", rich_help_panel=_GUESTS)(doctor.doctor)
app.command("snippet", rich_help_panel=_GUESTS)(snippet.snippet)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and give its exit status (`imdsproxy.cli.exitcodes`).

    Args:
        arguments: Without the program's name; `None` takes this process's own.
    """
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


def _run(arguments: list[str], invocation: options.Invocation) -> int:
    try:
        ended = app(arguments, prog_name="imdsproxy", standalone_mode=False, obj=invocation)
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
    invocation.output.error(RequestRefused(message, hint=f"`{command} --help` says what it takes"))
    return exitcodes.USAGE
