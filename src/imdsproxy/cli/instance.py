"""`imdsproxy instance add|list|show|set|remove|reopen`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, TypeAlias, cast

import typer

from imdsproxy.cli import completers, flags, options
from imdsproxy.cli.changing import change_from_file, change_one, order_instance, remove_each
from imdsproxy.errors import RequestRefused

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from imdsproxy.core.records import Json

__all__ = ["app"]

app = typer.Typer(
    help="Instances: add, list, show, set, remove, reopen, password.", no_args_is_help=True
)

Id: TypeAlias = Annotated[
    str,
    typer.Argument(
        metavar="ID", help="The instance's id or name.", autocompletion=completers.instances
    ),
]
MaybeId: TypeAlias = Annotated[
    str | None,
    typer.Argument(
        metavar="[ID]",
        help="The instance's id or name; none with --file.",
        show_default=False,
        autocompletion=completers.instances,
    ),
]
Ids: TypeAlias = Annotated[
    list[str],
    typer.Argument(
        metavar="ID...", help="Their ids or names.", autocompletion=completers.instances
    ),
]
Name: TypeAlias = Annotated[str | None, flags.flag("--name", "NAME", "Its name.")]
Hostname: TypeAlias = Annotated[str | None, flags.flag("--hostname", "NAME", "Its host name.")]
Project: TypeAlias = Annotated[str | None, flags.flag("--project", "ID", "Whose it is.")]
Network: TypeAlias = Annotated[
    str | None,
    flags.flag("--network", "NET", "Only those in this network.", completers.networks, "-n"),
]
OfPort: TypeAlias = Annotated[
    str | None,
    flags.flag(
        "--network",
        "NET",
        "The network of its port, by id or name; with --mac and --address it replaces all ports.",
        completers.networks,
        "-n",
    ),
]
FromLibvirt: TypeAlias = Annotated[
    str | None,
    flags.flag(
        "--from-libvirt",
        "DOMAIN",
        "Take cards, keys, user data and id of a domain, once; other flags of a record win.",
    ),
]
Mac: TypeAlias = Annotated[str | None, flags.flag("--mac", "MAC", "The port's MAC.")]
Addresses: TypeAlias = Annotated[
    list[str] | None,
    flags.flag("--address", "ADDRESS", "An address of the port; may be repeated."),
]
Ports: TypeAlias = Annotated[
    list[str] | None,
    flags.flag("--port", "network=NET[,mac=M][,address=A]...", "A further port; may be repeated."),
]
SshKeys: TypeAlias = Annotated[
    list[str] | None,
    flags.flag("--ssh-key", "FILE|KEY", "Public key, or a file of them; may be repeated."),
]
Tags: TypeAlias = Annotated[
    list[str] | None, flags.flag("--tag", "NAME=VALUE", "A tag; may be repeated.")
]
UserData: TypeAlias = Annotated[
    Path | None, flags.flag("--user-data", "FILE", "Its bytes as they are; - is standard input.")
]
VendorData: TypeAlias = Annotated[
    Path | None, flags.flag("--vendor-data", "FILE", "Text; - is standard input.")
]
Zone: TypeAlias = Annotated[
    str | None, flags.flag("--availability-zone", "ZONE", "Where it says that it runs.")
]
Type: TypeAlias = Annotated[
    str | None, flags.flag("--instance-type", "TYPE", "What it says that it is.")
]

Upstream: TypeAlias = Annotated[
    str | None, flags.flag("--upstream", "embedded|nova", "Who has its documents.")
]


def _switch(name: str, documents: str) -> object:
    return typer.Option(
        f"--{name}/--no-{name}", help=f"Serve the {documents} documents.", show_default=False
    )


ClearPassword: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--clear", help="Forget it, so that the guest can post another.", show_default=False
    ),
]
Ec2: TypeAlias = Annotated[bool | None, _switch("ec2", "EC2")]
Openstack: TypeAlias = Annotated[bool | None, _switch("openstack", "OpenStack")]
Nocloud: TypeAlias = Annotated[bool | None, _switch("nocloud", "NoCloud")]


_ADDED: Final[Mapping[str, object]] = {
    "instance": Annotated[
        str | None,
        typer.Argument(
            metavar="[ID]",
            help="Its id; made of --name, or the domain's UUID, without it.",
            show_default=False,
        ),
    ],
    "name": Annotated[str | None, flags.flag("--name", "NAME", "Its name; the id without it.")],
    "hostname": Annotated[
        str | None, flags.flag("--hostname", "NAME", "Its host name; made of the name without it.")
    ],
    "network": Annotated[
        str | None,
        flags.flag(
            "--network",
            "NET",
            "The network of its port, by id or name; the only one without it.",
            completers.networks,
            "-n",
        ),
    ],
}
"""What `add` says of parameters that `set` has too."""


def _register(command: str, help_text: str, *, create: bool) -> None:
    """`add` and `set` have the same flags, except --clear."""

    def change(
        context: typer.Context,
        instance: MaybeId = None,
        *,
        file: flags.RecordFile = None,
        from_libvirt: FromLibvirt = None,
        name: Name = None,
        hostname: Hostname = None,
        project: Project = None,
        network: OfPort = None,
        mac: Mac = None,
        address: Addresses = None,
        port: Ports = None,
        ssh_key: SshKeys = None,
        tag: Tags = None,
        user_data: UserData = None,
        vendor_data: VendorData = None,
        availability_zone: Zone = None,
        instance_type: Type = None,
        ec2: Ec2 = None,
        openstack: Openstack = None,
        nocloud: Nocloud = None,
        upstream: Upstream = None,
        clear: flags.Clear = None,
        as_json: options.Json = False,
        socket: options.Socket = None,
        config: options.Config = None,
        **rules: object,
    ) -> None:
        from imdsproxy.cli import record_flags  # noqa: PLC0415 - `--help` need not load it

        run = options.invocation(context, as_json=as_json, socket=socket, config=config)
        dialects = {"ec2": ec2, "openstack": openstack, "nocloud": nocloud}
        taken: dict[str, Json] = {}
        if from_libvirt is not None:
            taken = _from_libvirt(run, from_libvirt, network, mac, address)
            network = None
        elif create and file is None and network is None and (mac or address):
            network = _only_network(run)
        keys = record_flags.without_missing(
            {
                "name": name,
                "hostname": hostname,
                "project": project,
                "ports": record_flags.ports_of(
                    network=network, mac=mac, addresses=address or (), more=port or ()
                ),
                "ssh_keys": record_flags.ssh_keys_of(ssh_key or ()),
                "tags": record_flags.tags_of(tag or ()),
                "user_data": record_flags.payload_of(user_data),
                "vendor_data": record_flags.text_of(vendor_data),
                "availability_zone": availability_zone,
                "instance_type": instance_type,
                "dialects": record_flags.dialects_of(dialects),
                "upstream": upstream,
                "policy": record_flags.policy_of(rules),
            }
        )
        keys = {**taken, **keys}
        if file is not None:
            change_from_file(run, file, name=instance, keys=keys, create=create)
            return
        identity = keys.pop("id", None)
        if instance is None:
            instance = identity if isinstance(identity, str) else None
        if create and instance is None and name is not None:
            instance = record_flags.id_of_name(name)
        if create and instance is not None:
            keys.setdefault("name", instance)
        change_one(run, "instance", instance, keys, create=create, clear=clear or ())

    added = flags.reshape(change, without=("clear",), **_ADDED)
    app.command(command, help=help_text)(added if create else flags.reshape(change))


def _only_network(run: options.Invocation) -> str:
    from imdsproxy.cli.deducing import only_network  # noqa: PLC0415 - `--help` need not load it

    return only_network(run.daemon())


def _from_libvirt(
    run: options.Invocation,
    domain: str,
    network: str | None,
    mac: str | None,
    addresses: Sequence[str] | None,
) -> dict[str, Json]:
    from imdsproxy.cli.from_libvirt import import_domain  # noqa: PLC0415 - `--help` need not

    if mac or addresses:
        raise RequestRefused(
            "--from-libvirt has the domain's own MACs",
            hint="leave --mac and --address out; a static host of libvirt's network is its address",
        )
    return import_domain(run.daemon(), run.settings.sources.libvirt.uri, domain, network)


_register(
    "add", "Add an instance; with --file many instances and networks, all or none.", create=True
)
_register(
    "set",
    "Change what is given of an instance (ports, keys as a whole); with --file add and replace "
    "many.",
    create=False,
)


@app.command("list")
def list_(
    context: typer.Context,
    *,
    network: Network = None,
    as_json: options.Json = False,
    socket: options.Socket = None,
    config: options.Config = None,
) -> None:
    """Every instance, or those with a port in --network."""
    from imdsproxy.cli.record_output import show_instances  # noqa: PLC0415 - `--help` need not

    run = options.invocation(context, as_json=as_json, socket=socket, config=config)
    query = {} if network is None else {"network": network}
    shapes = cast("Sequence[Mapping[str, object]]", run.daemon().get("/v1/instances", query))
    if run.output.as_json:
        run.output.json(shapes)
    else:
        show_instances(run.output, shapes)


@app.command("show")
def show(
    context: typer.Context,
    instance: Id,
    *,
    as_json: options.Json = False,
    socket: options.Socket = None,
    config: options.Config = None,
) -> None:
    """One instance as a record that --file takes back."""
    from imdsproxy.cli.admin_client import path_to  # noqa: PLC0415 - `--help` need not load it
    from imdsproxy.cli.record_output import show_instance  # noqa: PLC0415 - as above

    run = options.invocation(context, as_json=as_json, socket=socket, config=config)
    shape = cast("Mapping[str, object]", run.daemon().get(path_to("instances", instance)))
    if run.output.as_json:
        run.output.json(shape)
    else:
        show_instance(run.output, shape)


@app.command("remove")
def remove(
    context: typer.Context,
    instances: Ids,
    *,
    as_json: options.Json = False,
    socket: options.Socket = None,
    config: options.Config = None,
) -> None:
    """Remove instances; their guests are told nothing more."""
    run = options.invocation(context, as_json=as_json, socket=socket, config=config)
    remove_each(run, "instance", instances)


@app.command("password")
def password(
    context: typer.Context,
    instance: Id,
    *,
    clear: ClearPassword = False,
    as_json: options.Json = False,
    socket: options.Socket = None,
    config: options.Config = None,
) -> None:
    """The password that its guest posted, encrypted with the instance's key; with --clear forget it."""
    from imdsproxy.cli.admin_client import path_to  # noqa: PLC0415 - `--help` need not load it
    from imdsproxy.cli.output import read_bytes_shape  # noqa: PLC0415 - as above
    from imdsproxy.cli.record_output import say_written  # noqa: PLC0415 - as above

    run = options.invocation(context, as_json=as_json, socket=socket, config=config)
    route = path_to("instances", instance, "password")
    if clear:
        cleared = cast("Mapping[str, object]", run.daemon().request("DELETE", route))
        say_written(run.output, f"password of instance {instance} cleared", cleared)
        return
    shape = cast("Mapping[str, Mapping[str, str]]", run.daemon().get(route))
    if run.output.as_json:
        run.output.json(shape)
    else:
        run.output.foreign(read_bytes_shape(shape["password"]))


@app.command("reopen")
def reopen(
    context: typer.Context,
    instance: Id,
    *,
    as_json: options.Json = False,
    socket: options.Socket = None,
    config: options.Config = None,
) -> None:
    """Have its boot begin anew: sealed user-data and locked trees are open until that is over."""
    run = options.invocation(context, as_json=as_json, socket=socket, config=config)
    order_instance(run, instance, "reopen", f"instance {instance} boots anew")
