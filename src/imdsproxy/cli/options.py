"""What commands share: their options and exit statuses, and one run with its settings, daemon and output."""

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

    from imdsproxy.admin_client import AdminClient, FleetClient
    from imdsproxy.config.load import Loaded
    from imdsproxy.config.schema import Settings

_AT_A_PROMPT_S: Final = 1.0
"""An operator waits for names at a prompt."""

OK: Final = 0
NO: Final = 1
"""Done, and the answer is no."""

USAGE: Final = 64
NOT_IN_FORCE: Final = 75
INTERRUPTED: Final = 130
PIPE_CLOSED: Final = 141
"""Exit statuses; errors bring their own (`imdsproxy.errors`, after sysexits.h)."""


def flag(
    usage: str, help_text: str, complete: Callable[..., list[str]] | None = None
) -> OptionInfo:
    """An option.

    Args:
        usage: Its names, and what stands for its value: `--file -f FILE`. One without a value has none; `--on/--off`
            has a name for each answer.
        help_text: What it is.
        complete: What a shell may complete its value to.
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
    """An argument; described as `flag`."""
    described: ArgumentInfo = typer.Argument(
        metavar=metavar, help=help_text, show_default=False, autocompletion=complete
    )
    return described


def complete_networks(context: typer.Context, incomplete: str) -> list[str]:
    """Ids and names of networks that begin so."""
    return _complete(context, "networks", incomplete)


def complete_instances(context: typer.Context, incomplete: str) -> list[str]:
    """Ids and names of instances that begin so."""
    return _complete(context, "instances", incomplete)


def _complete(context: typer.Context, kind: str, incomplete: str) -> list[str]:
    run, place = Invocation(), cast("Any", context)
    # Options before the word that is completed, also those of the commands around its own. Typer 0.15 has texts there.
    while place is not None:
        run.socket = run.socket or _path_of(place.params.get("socket"))
        run.config = run.config or _path_of(place.params.get("config"))
        run.fleet = run.fleet or tuple(place.params.get("fleet") or ())
        run.certificate = run.certificate or _path_of(place.params.get("fleet_certificate"))
        place = place.parent
    try:
        # A fleet has very many instances: only those that may be meant.
        query = {"text": incomplete} if kind == "instances" else None
        shapes = replace(run.api(), timeout_s=_AT_A_PROMPT_S).get(f"/v1/{kind}", query)
    except ImdsproxyError:
        # There is no place for an error: the shell puts all output into the command line.
        return []
    records = [shape["record"] for shape in shapes]
    words = [record["id"] for record in records] + [record.get("name", "") for record in records]
    return [word for word in dict.fromkeys(words) if word and word.startswith(incomplete)]


def _path_of(given: str | Path | None) -> Path | None:
    return Path(given) if given else None


def network_flag(help_text: str) -> OptionInfo:
    """--network, in the words of its command."""
    return flag("--network -n NET", help_text, complete_networks)


Config: TypeAlias = Annotated[
    Path | None, flag("--config -c FILE", "Settings (default: /etc/imdsproxy/imdsproxy.yaml).")
]
Socket: TypeAlias = Annotated[
    Path | None,
    flag("--socket -s PATH", "The daemon's admin socket (default: as the settings have it)."),
]
Fleet: TypeAlias = Annotated[
    list[str] | None,
    flag(
        "--fleet URL",
        "A fleet's hub, https://ADDRESS:PORT, in place of this host's daemon; of several the first that answers.",
    ),
]
Certificate: TypeAlias = Annotated[
    Path | None,
    flag(
        "--fleet-certificate FILE",
        "With --fleet, what `fleet operator` made (default: /etc/imdsproxy/fleet/operator.pem).",
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
    """One run of the command line: what was asked for before and after the command's name."""

    config: Path | None = None
    socket: Path | None = None
    fleet: tuple[str, ...] = ()
    certificate: Path | None = None
    output: Output = field(default_factory=Output)

    def load(self) -> Loaded:
        """The settings; `ConfigError` with every problem."""
        from imdsproxy.config.load import load_settings  # noqa: PLC0415 - `--help` need not load it

        return load_settings(self.config, os.environ)

    @property
    def settings(self) -> Settings:
        """The settings; `ConfigError` with every problem."""
        return self.load().settings

    def api(self) -> AdminClient:
        """The fleet that was named or that the settings name, else the daemon."""
        if self.fleet or (self.socket is None and self.settings.operator.hubs):
            return self.hubs()
        return self.daemon()

    def hubs(self) -> FleetClient:
        """The fleet; `RequestRefused` where none is named."""
        from imdsproxy.admin_client import FleetClient  # noqa: PLC0415 - as below

        urls = self.fleet or tuple(self.settings.operator.hubs)
        if not urls:
            raise RequestRefused(
                "this command is about a fleet, and none is named",
                hint="`imdsproxy --fleet https://HUB:8469 …`, or operator.hubs in the settings",
            )
        for url in urls:
            where = urlsplit(url)
            if where.scheme != "https" or not where.hostname:
                raise RequestRefused(f"{url} is no URL of a hub", hint="https://ADDRESS:8469")
        certificate = self.certificate or self.settings.operator.certificate
        return FleetClient(certificate, waiting=None, urls=urls)

    def daemon(self) -> AdminClient:
        """The daemon, by the socket that was named or that the settings name."""
        from imdsproxy.admin_client import AdminClient  # noqa: PLC0415 - the daemon itself need not load it

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
    """What was asked for, options after the command's name winning over those before it."""
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
    """A function of an `Invocation` as a command, which asks this host's daemon, or a fleet.

    In the place of the invocation typer sees --json, --socket, --config, --fleet and --fleet-certificate.

    Args:
        function: Its first parameter is the invocation.
        shared: Which of those options it takes.
        flags: Annotations of what typer sees in the place of `**values`, by name. Their default is `None`.
    """
    signature = inspect.signature(function, eval_str=True)
    own = list(signature.parameters.values())[1:]
    if flags is not None:
        own[-1:] = [_keyword(name, kind, None) for name, kind in flags.items()]
    own += [_keyword(name, *_SHARED[name]) for name in shared]

    def run(context: typer.Context, **values: Any) -> int | None:  # noqa: ANN401 - of flags
        given = {name: values.pop(name) for name in shared}
        asked = invocation(context, **given)
        if asked.fleet and "fleet" not in shared:
            raise RequestRefused(
                f"`{context.command_path}` is about this host, and --fleet names a fleet",
                hint="run it on the host, without --fleet; `imdsproxy fleet --help` has what is about a fleet",
            )
        return function(asked, **values)

    run.__name__, run.__doc__ = function.__name__, function.__doc__
    context = inspect.signature(run, eval_str=True).parameters["context"]
    vars(run)["__signature__"] = inspect.Signature([context, *own])
    return run


host_command = partial(command, shared=("as_json", "socket", "config"))
"""As `command`; it asks this host's daemon, and no fleet."""

json_command = partial(command, shared=("as_json",))
"""As `command`; it asks no daemon and reads no settings."""

fleet_command = partial(command, shared=("as_json", "config", *_OF_FLEET))
"""As `command`; it asks a fleet."""

bare_command = partial(command, shared=())
"""As `command`; none of these options may stand after its name."""

config_command = partial(command, shared=("config",))
"""As `command`; it is one of the daemon's processes."""


def _keyword(name: str, annotation: object, default: object) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )
