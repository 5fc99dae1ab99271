"""The program's command line: today's options, and every spelling that agents and their wrappers have used."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

from imdsproxy.app.namespace_proxy.option_files import read_ini_files, read_settings
from imdsproxy.core.haproxy.namespace_proxy import (
    DEFAULT_PORT,
    DEFAULT_STATE_PATH,
    parse_facility,
)
from imdsproxy.errors import RequestRefused

__all__ = ["CleanUp", "Run", "describe_options", "parse_command_line"]

_DESCRIPTION: Final = """\
Be the metadata proxy of one network or router: HAProxy, in the network namespace that this is started in, which
sends what guests ask to a unix socket, and says there whose they are."""

_IGNORED_VALUES: Final = (
    "log-file",
    "logfile",
    "log-dir",
    "logdir",
    "log-config",
    "log-config-append",
    "log-date-format",
)
_IGNORED_FLAGS: Final = (
    "metadata-proxy-watch-log",
    "use-stderr",
    "use-journal",
    "use-json",
    "watch-log-file",
    "verbose",
)

_EPILOG: Final = f"""\
`%(prog)s cleanup ID` removes what a proxy that has ended left; `cleanup --help` says more.

For each option the command line wins over --config-file and --config-dir, these over the environment
(IMDSPROXY_NAMESPACE_PROXY__METADATA_PORT and so on), that over the settings file.

Old spellings are accepted: underscores for dashes, --nodaemonize, --nodebug. So are these options without effect, since
HAProxy has no log file and writes nothing to the terminal once it runs:
{", ".join(f"--{name}" for name in (*_IGNORED_VALUES, *_IGNORED_FLAGS))}.

Exit statuses: 0 HAProxy runs and has bound the port (or was ended, with --no-daemonize); 64 the command line is not
acceptable; 70 HAProxy refuses; 71 the host refuses: no HAProxy, no such user, group or directory, the port is in use,
the proxy runs already; 77 privileges are missing; 78 a configuration file must be changed."""


_CONFIG_HELP: Final = (
    "imdsproxy's settings: the section namespace_proxy has the same options (default: "
    "/etc/imdsproxy/imdsproxy.yaml and conf.d beside it, where they have this section)"
)


@dataclass(frozen=True, slots=True)
class Run:
    """What a proxy is to be; see `ProxyDaemon`."""

    network_id: str | None
    router_id: str | None
    port: str
    socket: str | None
    user: str | None
    group: str | None
    pid_file: str | None
    daemonize: bool
    state_path: str
    use_syslog: bool | None
    facility: str
    debug: bool


@dataclass(frozen=True, slots=True)
class CleanUp:
    """What a proxy has left."""

    uuid: str
    pid_file: str | None
    state_path: str


class _Parser(argparse.ArgumentParser):
    """argparse, whose refusals are ours."""

    def error(self, message: str) -> NoReturn:
        raise RequestRefused(message, hint=f"`{self.prog} --help` says what it takes")


def parse_command_line(
    arguments: Sequence[str],
    *,
    program: str,
    environment: Mapping[str, str],
    config: Path | None = None,
) -> Run | CleanUp:
    """What is asked for.

    Args:
        arguments: Without the program's name.
        program: Its name, for the help.
        environment: The process's variables.
        config: Stands for --config where that is not among the arguments.

    Raises:
        RequestRefused: An option is unknown or wrong.
        ConfigUnreadable: A file of --config-file, --config-dir or --config is not there.
        ConfigInvalid: One makes no sense, or settings break the schema.
        SystemExit: --help was asked for, and given.
    """
    if list(arguments[:1]) == ["cleanup"]:
        found = _clean_up_parser(program).parse_args(list(arguments[1:]))
    else:
        found = _run_parser(program).parse_args(list(arguments))
    settings = read_settings(config if found.config is None else Path(found.config), environment)
    if "id" in found:
        state_path = found.state_path or settings.get("state_path") or DEFAULT_STATE_PATH
        return CleanUp(found.id, found.pid_file or None, str(state_path))
    state_path = str(settings.get("state_path", DEFAULT_STATE_PATH))
    files, directories = found.config_file or (), found.config_dir or ()
    written = read_ini_files(files, directories, found.state_path, state_path)
    told = {name: value for name, value in vars(found).items() if value is not None}
    return _run(found.network_id, found.router_id, {**settings, **written, **told})


def describe_options(program: str) -> tuple[str, list[tuple[str, str]], str]:
    """What the help says: a description, each option with its meaning, and more in paragraphs."""
    options = [
        (f"{', '.join(one.option_strings)} {one.metavar or ''}".rstrip(), one.help)
        for one in _run_parser(program)._actions  # noqa: SLF001 - argparse tells nowhere else
        if one.help and one.help != argparse.SUPPRESS
    ]
    return _DESCRIPTION, options, _EPILOG.replace("%(prog)s", program)


def _clean_up_parser(program: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f"{program} cleanup",
        description="Remove the configuration, and the pid file, of a proxy that has ended. One that runs is left "
        "alone: end it first, with SIGTERM.",
        allow_abbrev=False,
    )
    parser.add_argument("id", metavar="ID", help="UUID of its network or router")
    _value(parser, "pid-file", "FILE", "its pid file, to be removed too")
    _value(parser, "state-path", "DIR", f"as it was started with (default: {DEFAULT_STATE_PATH})")
    _value(parser, "config", "FILE", _CONFIG_HELP)
    return parser


def _run_parser(program: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=program,
        usage="%(prog)s (--network-id UUID | --router-id UUID) [option ...]\n       %(prog)s cleanup ID [option ...]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _value(parser, "network-id", "UUID", "the network that all guests are on")
    _value(parser, "router-id", "UUID", "the router that the guests' networks are on")
    _value(
        parser,
        "metadata-port",
        "PORT",
        f"TCP port to listen on, at every address (default: {DEFAULT_PORT})",
    )
    _value(parser, "metadata-proxy-socket", "PATH",
           "unix socket that requests go to (default: metadata_proxy in the state path)")  # fmt: skip
    _value(parser, "metadata-proxy-user", "USER",
           "name or id of the account that HAProxy takes once it listens (default: the present one)")  # fmt: skip
    _value(
        parser,
        "metadata-proxy-group",
        "GROUP",
        "name or id of its group (default: the present one)",
    )
    _value(parser, "pid-file", "FILE", "where HAProxy's pid goes (default: nowhere)")
    _flag(parser, "daemonize", "put HAProxy in the background, and end once it listens (the default)",
          "become HAProxy, with the same pid")  # fmt: skip
    _value(parser, "state-path", "DIR",
           f"HAProxy's configuration goes to ns-metadata-proxy in it (default: {DEFAULT_STATE_PATH})")  # fmt: skip
    _flag(parser, "debug", "have HAProxy log at the level debug instead of info", None)
    _flag(parser, "use-syslog", "log requests to /dev/log (default: if it is there)", "log nothing")
    _value(parser, "syslog-log-facility", "NAME", "as LOG_USER (default: LOG_LOCAL0)")
    _value(parser, "config-file", "FILE",
           "read the options above, but ids, pid file and daemonize, from [DEFAULT] of an ini file of Neutron's; may "
           "be repeated", action="append")  # fmt: skip
    _value(parser, "config-dir", "DIR", "the same, of every *.conf in it", action="append")
    _value(parser, "config", "FILE", _CONFIG_HELP)
    for name in _IGNORED_VALUES:
        _value(parser, name, "IGNORED", argparse.SUPPRESS)
    for name in _IGNORED_FLAGS:
        _flag(parser, name, argparse.SUPPRESS, None)
    return parser


def _value(
    parser: argparse.ArgumentParser,
    name: str,
    metavar: str,
    help_text: str,
    *,
    action: str = "store",
) -> None:
    destination = name.replace("-", "_")
    parser.add_argument(
        f"--{name}", dest=destination, metavar=metavar, help=help_text, action=action
    )
    if "-" in name:
        parser.add_argument(
            f"--{destination}", dest=destination, help=argparse.SUPPRESS, action=action
        )


def _flag(parser: argparse.ArgumentParser, name: str, on: str, off: str | None) -> None:
    """`--NAME`, and its opposite as it is spelled today, as oslo.config spells it, and with underscores."""
    destination = name.replace("-", "_")
    words = {"dest": destination, "default": None}
    parser.add_argument(f"--{name}", action="store_true", help=on, **words)  # type: ignore[arg-type]  # of both types
    parser.add_argument(
        f"--no-{name}", action="store_false", help=off or argparse.SUPPRESS, **words  # type: ignore[arg-type]  # as above
    )  # fmt: skip
    old = {
        f"--{destination}",
        f"--no-{destination}",
        f"--no_{destination}",
        f"--no{name}",
        f"--no{destination}",
    }
    for spelling in sorted(old - {f"--{name}", f"--no-{name}"}):
        action = "store_false" if spelling.startswith("--no") else "store_true"
        parser.add_argument(spelling, action=action, help=argparse.SUPPRESS, **words)  # type: ignore[arg-type]  # as above


def _run(network_id: str | None, router_id: str | None, options: Mapping[str, object]) -> Run:
    def text(name: str) -> str | None:
        # Empty is as if it was not there.
        return str(options.get(name) or "") or None

    syslog = options.get("use_syslog")
    return Run(
        network_id=network_id,
        router_id=router_id,
        port=text("metadata_port") or str(DEFAULT_PORT),
        socket=text("metadata_proxy_socket"),
        user=text("metadata_proxy_user"),
        group=text("metadata_proxy_group"),
        pid_file=text("pid_file"),
        daemonize=options.get("daemonize") is not False,
        state_path=text("state_path") or DEFAULT_STATE_PATH,
        use_syslog=None if syslog is None else bool(syslog),
        facility=parse_facility(text("syslog_log_facility") or "local0"),
        debug=options.get("debug") is True,
    )
