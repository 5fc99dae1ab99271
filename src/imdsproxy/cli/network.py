"""`imdsproxy network add|list|show|set|remove`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, TypeAlias, cast

import typer

from imdsproxy.cli import completers, flags, options
from imdsproxy.cli.changing import change_from_file, change_one, remove_each
from imdsproxy.errors import RequestRefused

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["app"]

app = typer.Typer(help="Networks: add, list, show, set, remove.", no_args_is_help=True)

Id: TypeAlias = Annotated[
    str,
    typer.Argument(
        metavar="ID", help="The network's id or name.", autocompletion=completers.networks
    ),
]
MaybeId: TypeAlias = Annotated[
    str | None,
    typer.Argument(
        metavar="[ID]",
        help="The network's id or name; none with --file.",
        show_default=False,
        autocompletion=completers.networks,
    ),
]
_NewId: TypeAlias = Annotated[
    str | None,
    typer.Argument(
        metavar="[ID]",
        help="Its id; the name of the bridge, interface or namespace without it.",
        show_default=False,
    ),
]
Ids: TypeAlias = Annotated[
    list[str],
    typer.Argument(metavar="ID...", help="Their ids or names.", autocompletion=completers.networks),
]
Name: TypeAlias = Annotated[str | None, flags.flag("--name", "NAME", "A name for people.")]
Project: TypeAlias = Annotated[str | None, flags.flag("--project", "ID", "Whose it is.")]
Namespace: TypeAlias = Annotated[
    str | None, flags.flag("--namespace", "NAME", "Reached through this network namespace.")
]
Device: TypeAlias = Annotated[
    str | None, flags.flag("--device", "DEV", "The namespace's device that guests are behind.")
]
ManageAddresses: TypeAlias = Annotated[
    bool | None,
    typer.Option(
        "--manage-addresses/--leave-addresses",
        help="Put the metadata addresses on --device, or leave that to others.",
        show_default=False,
    ),
]
Interface: TypeAlias = Annotated[
    str | None, flags.flag("--interface", "DEV", "Reached through this interface of the host.")
]
Bridge: TypeAlias = Annotated[
    str | None,
    flags.flag(
        "--bridge",
        "DEV",
        "Reached through this bridge of the host.",
    ),
]
Subnets: TypeAlias = Annotated[
    list[str] | None,
    flags.flag(
        "--subnet", "CIDR[,gateway=A][,dns=A]...", "An address range of guests; may be repeated."
    ),
]
Mtu: TypeAlias = Annotated[int | None, flags.flag("--mtu", "BYTES", "What guests are told.")]
Scope: TypeAlias = Annotated[
    str | None, flags.flag("--scope", "network|router", "What the id stands for.")
]
MacCheck: TypeAlias = Annotated[
    bool | None,
    typer.Option(
        "--mac-check/--no-mac-check",
        help="Believe an address only together with its MAC (the default), or also of guests behind a router.",
        show_default=False,
    ),
]


def _register(command: str, help_text: str, *, create: bool) -> None:
    """`add` and `set` have the same flags, except --clear."""

    def change(
        context: typer.Context,
        network: MaybeId = None,
        *,
        file: flags.RecordFile = None,
        namespace: Namespace = None,
        device: Device = None,
        manage_addresses: ManageAddresses = None,
        interface: Interface = None,
        bridge: Bridge = None,
        name: Name = None,
        project: Project = None,
        subnet: Subnets = None,
        mtu: Mtu = None,
        scope: Scope = None,
        mac_check: MacCheck = None,
        clear: flags.Clear = None,
        as_json: options.Json = False,
        socket: options.Socket = None,
        config: options.Config = None,
        **rules: object,
    ) -> None:
        from imdsproxy.cli import record_flags  # noqa: PLC0415 - `--help` need not load it

        run = options.invocation(context, as_json=as_json, socket=socket, config=config)
        listener = record_flags.listener_of(
            namespace=namespace,
            interface=interface,
            bridge=bridge,
            device=device,
            manage_addresses=manage_addresses,
            changing=not create,
        )
        if file is None and listener is None and create:
            raise RequestRefused(
                "a network needs a listener: --bridge DEV | --interface DEV | --namespace NAME",
                hint="`imdsproxy network add red --bridge br-red`, or --file FILE",
            )
        if file is None and network is None and create:
            from imdsproxy.cli.deducing import (  # noqa: PLC0415 - `--help` need not load it
                name_of_listener,
            )

            network = name_of_listener(listener)
        keys = record_flags.without_missing(
            {
                "name": name,
                "project": project,
                "listener": listener,
                "subnets": record_flags.subnets_of(subnet or ()),
                "mtu": mtu,
                "scope": scope,
                "mac_check": mac_check,
                "policy": record_flags.policy_of(rules),
            }
        )
        if file is not None:
            change_from_file(run, file, name=network, keys=keys, create=create)
        else:
            change_one(run, "network", network, keys, create=create, clear=clear or ())

    added = flags.reshape(change, without=("clear",), network=_NewId)
    app.command(command, help=help_text)(added if create else flags.reshape(change))


_register(
    "add", "Add a network; with --file many networks and instances, all or none.", create=True
)
_register(
    "set", "Change what is given of a network; with --file add and replace many.", create=False
)


@app.command("list")
def list_(
    context: typer.Context,
    *,
    as_json: options.Json = False,
    socket: options.Socket = None,
    config: options.Config = None,
) -> None:
    """Every network, how it is reached, and whether it is served."""
    from imdsproxy.cli.record_output import show_networks  # noqa: PLC0415 - `--help` need not

    run = options.invocation(context, as_json=as_json, socket=socket, config=config)
    shapes = cast("Sequence[Mapping[str, object]]", run.daemon().get("/v1/networks"))
    if run.output.as_json:
        run.output.json(shapes)
    else:
        show_networks(run.output, shapes)


@app.command("show")
def show(
    context: typer.Context,
    network: Id,
    *,
    as_json: options.Json = False,
    socket: options.Socket = None,
    config: options.Config = None,
) -> None:
    """One network as a record that --file takes back."""
    from imdsproxy.cli.admin_client import path_to  # noqa: PLC0415 - `--help` need not load it
    from imdsproxy.cli.record_output import show_network  # noqa: PLC0415 - as above

    run = options.invocation(context, as_json=as_json, socket=socket, config=config)
    shape = cast("Mapping[str, object]", run.daemon().get(path_to("networks", network)))
    if run.output.as_json:
        run.output.json(shape)
    else:
        show_network(run.output, shape)


@app.command("remove")
def remove(
    context: typer.Context,
    networks: Ids,
    *,
    as_json: options.Json = False,
    socket: options.Socket = None,
    config: options.Config = None,
) -> None:
    """Remove networks that no instance has a port in."""
    run = options.invocation(context, as_json=as_json, socket=socket, config=config)
    remove_each(run, "network", networks)
