"""`neutron-ns-metadata-proxy`: a HAProxy for one network or router, for agents that spawn one per namespace.

It is independent of the daemon: it needs no controller, and ends once HAProxy runs. Agents start hundreds, so no module
here imports more than it needs.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

from imdsproxy.config.neutron_agents import DEFAULT_PORT, DEFAULT_STATE_PATH, parse_facility
from imdsproxy.errors import (
    ConfigInvalid,
    ConfigUnreadable,
    ImdsproxyError,
    Problem,
    RequestRefused,
    host_refused,
)
from imdsproxy.tools.namespace_proxy.proxy import (
    NetworkMetadataProxyHandler,
    ProxyDaemon,
    cleanup_config_file,
    cleanup_pid_file,
)

__all__ = ["NetworkMetadataProxyHandler", "ProxyDaemon", "cleanup_config_file", "main"]

_INTERRUPTED: Final = 130
_STANDARD_ERROR: Final = 2
_SECTION: Final = "namespace_proxy"
_SWITCHES: Final = ("debug", "use-syslog")
_IN_FILES: Final = (
    "state_path metadata_port metadata_proxy_socket metadata_proxy_user metadata_proxy_group "
    "syslog_log_facility debug use_syslog"
)
"""Options in ini files. The state path comes first, because other values may refer to it."""

_TRUE: Final = ("1", "t", "true", "on", "y", "yes")
_FALSE: Final = ("0", "f", "false", "off", "n", "no")

_DESCRIPTION: Final = """\
Run the metadata proxy of one network or router: a HAProxy in the current network namespace. It forwards guests'
requests to a unix socket, with headers that name the network or router and the guest's address."""

_IGNORED_VALUES: Final = (
    "log-file logfile log-dir logdir log-config log-config-append log-date-format"
)
_IGNORED_SWITCHES: Final = (
    "metadata-proxy-watch-log use-stderr use-journal use-json watch-log-file verbose"
)

_EPILOG: Final = f"""\
`%(prog)s cleanup ID` removes the files of an ended proxy; see `cleanup --help`.

The command line has priority over --config-file and --config-dir, these over the environment
(IMDSPROXY_NAMESPACE_PROXY__METADATA_PORT and so on), and the environment over the settings file.

Old spellings are accepted: underscores for dashes, --nodaemonize, --nodebug. These options are accepted without effect,
because HAProxy has no log file and writes nothing to the terminal once it runs:
{", ".join(f"--{name}" for name in f"{_IGNORED_VALUES} {_IGNORED_SWITCHES}".split())}.

Exit statuses: 0 HAProxy runs and has bound the port (or was ended, with --no-daemonize); 64 the command line is
invalid; 70 HAProxy refuses its configuration; 71 the host refuses: no HAProxy, no such user, group or directory, the
port is in use, the proxy already runs; 77 privileges are missing; 78 a configuration file is invalid."""


_CONFIG: Final = """\
config FILE: imdsproxy's settings; the section namespace_proxy has the same options (default: \
/etc/imdsproxy/imdsproxy.yaml and conf.d beside it, if they have this section)
"""
_OPTIONS: Final = f"""\
network-id UUID: the network of all guests
router-id UUID: the router of the guests' networks
metadata-port PORT: TCP port to listen on, at every address (default: {DEFAULT_PORT})
metadata-proxy-socket PATH: unix socket for the requests (default: metadata_proxy in the state path)
metadata-proxy-user USER: name or id of HAProxy's account once it listens (default: the current account)
metadata-proxy-group GROUP: name or id of HAProxy's group (default: the current group)
pid-file FILE: file for HAProxy's pid (default: none)
daemonize: run HAProxy in the background, and end once it listens (the default)| become HAProxy, with the same pid
state-path DIR: parent of ns-metadata-proxy, the directory of HAProxy's configuration (default: {DEFAULT_STATE_PATH})
debug: log at the level debug instead of info
use-syslog: log requests to /dev/log (default: if it exists)| log nothing
syslog-log-facility NAME: as LOG_USER (default: LOG_LOCAL0)
config-file FILE: read the options above, except ids, pid file and daemonize, from [DEFAULT] of a Neutron ini \
file; may be repeated
config-dir DIR: read every *.conf in this directory, as --config-file
{_CONFIG}"""
"""Options with their help texts; an option without a value is a switch, with the help text of its opposite after
`|`."""

_CLEAN_UP_OPTIONS: Final = f"""\
pid-file FILE: the proxy's pid file, to remove too
state-path DIR: the proxy's state path (default: {DEFAULT_STATE_PATH})
{_CONFIG}"""


def main(
    arguments: Sequence[str] | None = None,
    *,
    program: str = "neutron-ns-metadata-proxy",
    config: Path | None = None,
) -> int:
    """Run the program; return its exit status (`imdsproxy.cli.options`).

    `config`: imdsproxy's settings file, if the command line named it before this program's own arguments.
    """
    _open_standard_files()
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options = parse_command_line(words, program=program, environment=os.environ, config=config)
        if "id" in options:
            cleanup_config_file(options["id"], options.get("state_path"))
            if "pidfile" in options:
                cleanup_pid_file(Path(options["pidfile"]), f"{options['id']}.conf")
            return 0
        daemonize = options.pop("daemonize", True)
        daemon = ProxyDaemon(options.pop("pidfile", None), **options)
        if daemonize:
            daemon.start()
        else:
            daemon.run()
    except (ImdsproxyError, OSError) as error:
        # Report unforeseen errors in one line, too: an agent's log should hold no traceback.
        known = error if isinstance(error, ImdsproxyError) else host_refused("run the proxy", error)
        # `sys.stderr` is `None` if our parent has closed it.
        if sys.stderr is not None:
            sys.stderr.write(_in_lines(known))
        return known.exit_status
    except KeyboardInterrupt:
        return _INTERRUPTED
    except SystemExit:
        # argparse has printed its help.
        return 0
    return 0


def _open_standard_files() -> None:
    """Open descriptors 0, 1 and 2: HAProxy would replace a lock file with such a number."""
    while True:
        descriptor = os.open(os.devnull, os.O_RDWR)
        if descriptor > _STANDARD_ERROR:
            os.close(descriptor)
            return
        os.set_inheritable(descriptor, True)


def _in_lines(error: ImdsproxyError) -> str:
    """Format an error as the command line does, without its colour library, whose import takes most of the time."""
    message = " ".join(error.message.split())
    lines = [f"imdsproxy: {message}", *(f"  {problem}" for problem in error.problems)]
    if error.hint:
        lines.append(f"hint: {error.hint}")
    return "\n".join(lines) + "\n"


_ARGUMENTS: Final = {
    "metadata_port": "port",
    "metadata_proxy_socket": "proxy_socket",
    "metadata_proxy_user": "user",
    "metadata_proxy_group": "group",
    "pid_file": "pidfile",
    "syslog_log_facility": "facility",
}
"""Arguments of `ProxyDaemon` whose names differ from their options'."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RequestRefused(message, hint=f"see `{self.prog} --help`")


def parse_command_line(
    arguments: Sequence[str],
    *,
    program: str,
    environment: Mapping[str, str],
    config: Path | None = None,
) -> dict[str, Any]:
    """Parse the command line and merge it with files, environment and settings.

    Returns the arguments of `ProxyDaemon`, and `daemonize`; for a clean-up `id`, `pidfile` and `state_path`.

    Raises:
        RequestRefused: An option is unknown or wrong.
        ConfigUnreadable: A file of --config-file, --config-dir or --config is missing.
        ConfigInvalid: A file is malformed, or settings break the schema.
        SystemExit: --help was given; the help is printed.
    """
    words = list(arguments)
    if words[:1] == ["cleanup"]:
        parser, words = _clean_up_parser(program), words[1:]
    else:
        parser = run_parser(program)
    found = vars(parser.parse_args([_respell(word) for word in words]))
    found.pop("ignored", None)
    named = found.pop("config")
    files, directories = found.pop("config_file", None) or (), found.pop("config_dir", None) or ()
    settings = read_settings(config if named is None else Path(named), environment)
    state_path = str(settings.get("state_path", DEFAULT_STATE_PATH))
    written = read_ini_files(files, directories, found["state_path"], state_path)
    given = {name: value for name, value in found.items() if value is not None}
    asked: dict[str, Any] = {
        _ARGUMENTS.get(name, name): value if isinstance(value, bool) else str(value)
        for name, value in (settings | written | given).items()
        # An empty value counts as absent, but an empty id is an error.
        if value is not None and (value != "" or name.endswith("id"))
    }
    if "facility" in asked:
        asked["facility"] = parse_facility(asked["facility"])
    return asked


def _clean_up_parser(program: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f"{program} cleanup",
        description="Remove the configuration and the pid file of a proxy that has ended. End a running proxy first, "
        "with SIGTERM.",
        allow_abbrev=False,
    )
    parser.add_argument("id", metavar="ID", help="UUID of the proxy's network or router")
    _add_options(parser, _CLEAN_UP_OPTIONS)
    return parser


def run_parser(program: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=program,
        usage="%(prog)s (--network-id UUID | --router-id UUID) [option ...]\n       %(prog)s cleanup ID [option ...]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    values = "".join(f"{name} IGNORED:\n" for name in _IGNORED_VALUES.split())
    switches = "".join(f"{name}:\n" for name in _IGNORED_SWITCHES.split())
    _add_options(parser, _OPTIONS + values + switches)
    return parser


def _respell(word: str) -> str:
    """Convert an option to its present spelling: dashes, and `--no-NAME` instead of `--noNAME` for a switch."""
    name, equals, value = word.partition("=")
    if not name.startswith("--"):
        return word
    name = name.replace("_", "-")
    off = name.startswith("--no") and name[4:] in (
        "daemonize",
        *_SWITCHES,
        *_IGNORED_SWITCHES.split(),
    )
    return f"--no-{name[4:]}{equals}{value}" if off else f"{name}{equals}{value}"


def _add_options(parser: argparse.ArgumentParser, table: str) -> None:
    for row in table.splitlines():
        option, _, text = row.partition(":")
        name, _, metavar = option.partition(" ")
        on, _, off = (part.strip() or argparse.SUPPRESS for part in text.partition("|"))
        dest = "ignored" if on == argparse.SUPPRESS else name.replace("-", "_")
        if metavar:
            action = "append" if name in {"config-file", "config-dir"} else "store"
            parser.add_argument(f"--{name}", dest=dest, metavar=metavar, help=on, action=action)
        else:
            parser.add_argument(f"--{name}", dest=dest, action="store_true", default=None, help=on)
            parser.add_argument(f"--no-{name}", dest=dest, action="store_false", help=off)


def read_settings(
    config: Path | None, environment: Mapping[str, str], *, default: Path | None = None
) -> dict[str, object]:
    """Return imdsproxy's settings in the section `namespace_proxy`, by option name and without defaults.

    `config`: settings file; without one, the default file if it has the section. Raises `ConfigUnreadable`: a file
    cannot be read; `ConfigInvalid`: settings break the schema.
    """
    from imdsproxy.config import DEFAULT_CONFIG, ENVIRONMENT_PREFIX, find_files, unreadable

    default = default or DEFAULT_CONFIG
    prefix = f"{ENVIRONMENT_PREFIX}{_SECTION}".upper()
    if config is None and not any(name.upper().startswith(prefix) for name in environment):
        found = find_files(None, default)
        try:
            if not any(_SECTION.encode() in path.read_bytes() for path in found):
                return {}
        except OSError as error:
            raise unreadable(Path(str(error.filename)), error) from error
    from imdsproxy.config.load import load_settings

    loaded = load_settings(config, environment, default=default)
    return loaded.settings.namespace_proxy.model_dump(exclude_unset=True)


def read_ini_files(
    files: Sequence[str], directories: Sequence[str], state_path: str | None, otherwise: str
) -> dict[str, object]:
    """Return the options in [DEFAULT] of Neutron's ini files; later files override earlier ones.

    Args:
        state_path: State path from the command line, to which values may refer.
        otherwise: State path if neither the command line nor a file has one.

    Raises:
        ConfigInvalid: A file is not an ini file, or a value is invalid or refers to a missing option.
        ConfigUnreadable: A file or directory is missing, or a file is not UTF-8.
    """
    if not files and not directories:
        return {}
    from imdsproxy.config import neutron_ini

    paths = [Path(name) for name in files]
    try:
        for name in directories:
            # A glob pattern would treat a missing directory as empty.
            paths += sorted(path for path in Path(name).iterdir() if path.suffix == ".conf")
        parsed = [
            neutron_ini.parse_ini(neutron_ini.decode_ini(path.read_bytes(), str(path)), str(path))
            for path in paths
        ]
    except OSError as error:
        raise ConfigUnreadable(f"cannot read {error.filename}: {error.strerror}") from error

    values: dict[str, object] = {}

    def look_up(name: str) -> str | None:
        if name == "state_path":
            return str(state_path or values.get(name) or otherwise).replace("$", "$$")
        found = neutron_ini.find_option(parsed, [(neutron_ini.DEFAULT_SECTION, name)])
        return None if found is None else found.value

    for name in _IN_FILES.split():
        option = neutron_ini.find_option(parsed, [(neutron_ini.DEFAULT_SECTION, name)])
        if option is None:
            continue
        try:
            value = neutron_ini.expand_value(option.value, look_up)
            values[name] = _decide(value) if name.replace("_", "-") in _SWITCHES else value
        except ValueError as error:
            problem = Problem(option.name, str(error), file=option.file, line=option.line)
            message = "a configuration file is invalid"
            raise ConfigInvalid(message, problems=(problem,)) from error
    return values


def _decide(value: str) -> bool:
    if value.lower() not in (*_TRUE, *_FALSE):
        raise ValueError(f"{value!r} is neither true nor false")
    return value.lower() in _TRUE
