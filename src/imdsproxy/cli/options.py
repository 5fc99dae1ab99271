"""Shared parts of commands: options, exit statuses, and an invocation with settings, daemon and output."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias, cast
from urllib.parse import urlsplit

import typer

from imdsproxy.cli.output import Output
from imdsproxy.errors import ImdsproxyError, RequestRefused

if TYPE_CHECKING:
    from typer.models import ArgumentInfo, OptionInfo

    from imdsproxy.api.client import AdminClient, Client, FleetClient
    from imdsproxy.config.load import Loaded
    from imdsproxy.config.schema import Settings

_AT_A_PROMPT_S: Final = 1.0
"""Timeout for completions, because an operator waits at the prompt."""

OK: Final = 0
NO: Final = 1
"""Exit status of a successful command with a negative answer."""

USAGE: Final = 64
NOT_IN_FORCE: Final = 75
INTERRUPTED: Final = 130
PIPE_CLOSED: Final = 141
"""Exit statuses; errors have their own (`imdsproxy.errors`, after sysexits.h)."""


def flag(
    usage: str, help_text: str, complete: Callable[..., list[str]] | None = None
) -> OptionInfo:
    """Declare an option.

    `usage`: names and metavar: `--file -f FILE`. A switch has no metavar; `--on/--off` names both values.
    """
    names = [word for word in usage.split() if word.startswith("-")]
    metavar = usage.removeprefix(" ".join(names)).strip()
    option: OptionInfo = typer.Option(
        *names, metavar=metavar, help=help_text, show_default=False, autocompletion=complete
    )
    return option


def argument(
    metavar: str, help_text: str, complete: Callable[..., list[str]] | None = None
) -> ArgumentInfo:
    """Declare an argument; the parameters are as for `flag`."""
    described: ArgumentInfo = typer.Argument(
        metavar=metavar, help=help_text, show_default=False, autocompletion=complete
    )
    return described


def complete_networks(context: typer.Context, incomplete: str) -> list[str]:
    return _complete(context, "networks", incomplete)


def complete_instances(context: typer.Context, incomplete: str) -> list[str]:
    return _complete(context, "instances", incomplete)


def _complete(context: typer.Context, kind: str, incomplete: str) -> list[str]:
    run, place = Invocation(), cast("Any", context)
    # Options before the completed word count, including those of parent commands. Typer 0.15 has them as text.
    while place is not None:
        run.socket = run.socket or _path_of(place.params.get("socket"))
        run.config = run.config or _path_of(place.params.get("config"))
        run.fleet = run.fleet or tuple(place.params.get("fleet") or ())
        run.certificate = run.certificate or _path_of(place.params.get("fleet_certificate"))
        place = place.parent
    try:
        # A fleet has very many instances, so the hub filters them.
        query = {"text": incomplete} if kind == "instances" else None
        shapes = replace(run.api(), timeout_s=_AT_A_PROMPT_S).get(f"/v1/{kind}", query)
    except ImdsproxyError:
        # An error cannot be shown: the shell puts all output into the command line.
        return []
    records = [shape["record"] for shape in shapes]
    words = [record["id"] for record in records] + [record.get("name", "") for record in records]
    return [word for word in dict.fromkeys(words) if word and word.startswith(incomplete)]


def _path_of(given: str | Path | None) -> Path | None:
    return Path(given) if given else None


def network_flag(help_text: str) -> OptionInfo:
    """Declare `--network` with a help text for its command."""
    return flag("--network -n NET", help_text, complete_networks)


Config: TypeAlias = Annotated[
    Path | None,
    flag("--config -c FILE", "The settings file (default: /etc/imdsproxy/imdsproxy.yaml)."),
]
Socket: TypeAlias = Annotated[
    Path | None,
    flag("--socket -s PATH", "The daemon's admin socket (default: from the settings)."),
]
Fleet: TypeAlias = Annotated[
    list[str] | None,
    flag(
        "--fleet URL",
        "Use a fleet's hub, https://ADDRESS:PORT, instead of this host's daemon; may be repeated: the first that "
        "answers.",
    ),
]
Certificate: TypeAlias = Annotated[
    Path | None,
    flag(
        "--fleet-certificate FILE",
        "With --fleet, the operator's certificate from `fleet operator` (default: /etc/imdsproxy/fleet/operator.pem).",
    ),
]
Json: TypeAlias = Annotated[bool, flag("--json", "Print JSON, for programs.")]
Instance: TypeAlias = Annotated[
    str, argument("INSTANCE", "The instance's id or name.", complete_instances)
]
_NETWORK: Final = network_flag("The guest's network, by id or name.")
_ADDRESS: Final = flag("--from ADDRESS", "The guest's address.")
Network: TypeAlias = Annotated[str, _NETWORK]
Address: TypeAlias = Annotated[str, _ADDRESS]
MaybeNetwork: TypeAlias = Annotated[str | None, _NETWORK]
MaybeAddress: TypeAlias = Annotated[str | None, _ADDRESS]
_OF_FLEET: Final = ("fleet", "fleet_certificate")
_SHARED: Final = {
    "as_json": (Json, False),
    "socket": (Socket, None),
    "config": (Config, None),
    "fleet": (Fleet, None),
    "fleet_certificate": (Certificate, None),
}


@dataclass(slots=True)
class Invocation:
    """Shared options of one run of the command line, and access to settings, daemon and output."""

    config: Path | None = None
    socket: Path | None = None
    fleet: tuple[str, ...] = ()
    certificate: Path | None = None
    output: Output = field(default_factory=Output)

    def load(self) -> Loaded:
        """Read the settings; raise `ConfigError` with every problem."""
        from imdsproxy.config.load import load_settings

        return load_settings(self.config, os.environ)

    @property
    def settings(self) -> Settings:
        """Settings; reading them raises `ConfigError` with every problem."""
        return self.load().settings

    def api(self) -> Client:
        """Return a client of the fleet given by option or settings, otherwise of the daemon."""
        if self.fleet or (self.socket is None and self.settings.operator.hubs):
            return self.hubs()
        return self.daemon()

    def hubs(self) -> FleetClient:
        """Return a client of the fleet; raise `RequestRefused` if neither options nor settings name a hub."""
        from imdsproxy.api.client import FleetClient

        urls = self.fleet or tuple(self.settings.operator.hubs)
        if not urls:
            raise RequestRefused(
                "this command needs a fleet, but no hub is given",
                hint="use `imdsproxy --fleet https://HUB:8469 …`, or set operator.hubs",
            )
        for url in urls:
            where = urlsplit(url)
            if where.scheme != "https" or not where.hostname:
                raise RequestRefused(
                    f"{url} is not the URL of a hub", hint="use https://ADDRESS:8469"
                )
        certificate = self.certificate or self.settings.operator.certificate
        return FleetClient(certificate, urls, waiting=None)

    def daemon(self) -> AdminClient:
        """Return a client of the daemon, at the socket from the options or settings."""
        from imdsproxy.api.client import AdminClient

        socket = self.socket or self.settings.admin_socket
        return AdminClient(socket, waiting=self.output.starting)


def invocation(
    context: typer.Context,
    *,
    as_json: bool = False,
    config: Path | None = None,
    socket: Path | None = None,
    fleet: Sequence[str] | None = None,
    fleet_certificate: Path | None = None,
) -> Invocation:
    """Update the invocation with the options after the command's name, which override those before it."""
    run: Invocation = context.find_root().obj
    run.config = config or run.config
    run.socket = socket or run.socket
    run.fleet = tuple(fleet or run.fleet)
    run.certificate = fleet_certificate or run.certificate
    run.output.as_json = as_json or run.output.as_json
    return run


def command(
    function: Callable[..., int | None],
    *,
    shared: Collection[str] = ("as_json", "socket", "config", *_OF_FLEET),
    flags: Mapping[str, object] | None = None,
) -> Callable[..., int | None]:
    """Wrap a function of an `Invocation` as a command for this host's daemon or a fleet.

    The wrapper replaces the invocation by the options --json, --socket, --config, --fleet and --fleet-certificate.

    `flags`: annotations, by name, of the options that replace `**values`. Their default is `None`.
    """
    signature = inspect.signature(function, eval_str=True)
    own = list(signature.parameters.values())[1:]
    if flags is not None:
        own[-1:] = [_keyword(name, kind, None) for name, kind in flags.items()]
    own += [_keyword(name, *_SHARED[name]) for name in shared]

    def run(context: typer.Context, **values: Any) -> int | None:
        given = {name: values.pop(name) for name in shared}
        asked = invocation(context, **given)
        if asked.fleet and "fleet" not in shared:
            raise RequestRefused(
                f"`{context.command_path}` works on this host only, but --fleet names a fleet",
                hint="run it on the host, without --fleet; `imdsproxy fleet --help` lists commands for a fleet",
            )
        return function(asked, **values)

    run.__name__, run.__doc__ = function.__name__, function.__doc__
    context = inspect.signature(run, eval_str=True).parameters["context"]
    vars(run)["__signature__"] = inspect.Signature([context, *own])
    return run


host_command = partial(command, shared=("as_json", "socket", "config"))
"""Variant of `command` for this host's daemon only."""

json_command = partial(command, shared=("as_json",))
"""Variant of `command` without daemon and settings."""

fleet_command = partial(command, shared=("as_json", "config", *_OF_FLEET))
"""Variant of `command` for a fleet only."""

bare_command = partial(command, shared=())
"""Variant of `command` without shared options after its name."""

config_command = partial(command, shared=("config",))
"""Variant of `command` for the daemon's processes."""


def _keyword(name: str, annotation: object, default: object) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )
