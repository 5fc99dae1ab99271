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

A command is a function of its name, in a module of its name or in that of `_MODULES`; a group is its module's `app`.
"""

_MODULES: Final[Mapping[str, str]] = dict.fromkeys(
    ("run", "documents", "render", "reload", "stop", "version"), "daemon"
)

EXAMPLES: Final[Mapping[str, str]] = {
    "run": "imdsproxy run --config /etc/imdsproxy/imdsproxy.yaml",
    "documents": "imdsproxy documents --config /etc/imdsproxy/imdsproxy.yaml",
    "check": "imdsproxy check",
    "status": "imdsproxy status --check",
    "reload": "imdsproxy reload",
    "stop": "imdsproxy stop --data-plane",
    "render": "imdsproxy render",
    "config show": "imdsproxy config show --origin",
    "config schema": "imdsproxy config schema",
    "config sample": "imdsproxy config sample",
    "config import": "imdsproxy config import --neutron /etc/neutron/metadata_agent.ini",
    "version": "imdsproxy version",
    "completion": "imdsproxy completion bash",
    "network add": "imdsproxy network add red --bridge br-red --subnet 10.0.0.0/24,gateway=10.0.0.1",
    "network set": "imdsproxy network set red --mtu 1400",
    "network list": "imdsproxy network list",
    "network show": "imdsproxy network show red",
    "network remove": "imdsproxy network remove red",
    "instance add": "imdsproxy instance add web -n red --mac 52:54:00:12:34:56 --address 10.0.0.5 --user-data web.yaml",
    "instance set": "imdsproxy instance set web --tag role=web --clear user_data",
    "instance list": "imdsproxy instance list -n red",
    "instance show": "imdsproxy instance show web",
    "instance remove": "imdsproxy instance remove web",
    "instance reopen": "imdsproxy instance reopen web",
    "instance password": "imdsproxy instance password web | base64 -d | openssl pkeyutl -decrypt -inkey ~/.ssh/id_rsa",
    "namespace-proxy": "imdsproxy namespace-proxy --network-id 5c2f0c3e-0d0a-4d5e-9b1f-6a1c5d0a7e11",
    "get": "imdsproxy get /latest/meta-data/ -n red --from 10.0.0.5",
    "explain": "imdsproxy explain web --path /latest/user-data --probe",
    "watch": "imdsproxy watch -n red",
    "token revoke": "imdsproxy token revoke web",
    "token rotate": "imdsproxy token rotate",
    "token report": "imdsproxy token report",
    "doctor": "imdsproxy doctor -n red --from 10.0.0.5",
    "snippet": "imdsproxy snippet web --for libvirt",
}
"""One of each command, by what calls it: for its help, the reference and the manual page."""

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
        module = importlib.import_module(f"imdsproxy.cli.{_MODULES.get(name, identifier)}")
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
