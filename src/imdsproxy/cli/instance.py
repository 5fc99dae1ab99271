"""`imdsproxy instance add|list|show|set|remove|reopen|password`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, TypeAlias, cast

import typer

from imdsproxy.cli import completers
from imdsproxy.cli.admin_client import AdminClient, path_to
from imdsproxy.cli.options import Invocation, command, flag
from imdsproxy.cli.output import read_bytes_shape
from imdsproxy.cli.record_output import say_written, show_instance, show_instances
from imdsproxy.cli.records import RecordKind, make_app, order_instance
from imdsproxy.core.records import INSTANCE, Json
from imdsproxy.errors import RequestRefused

_NAMED: Final = 5
_NOT_IN_ID: Final = re.compile(r"[^A-Za-z0-9._-]+")
_LONGEST_ID: Final = 64

ClearPassword: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--clear", help="Forget it, so that the guest can post another.", show_default=False
    ),
]
Id: TypeAlias = Annotated[
    str,
    typer.Argument(
        metavar="ID", help="The instance's id or name.", autocompletion=completers.instances
    ),
]


def _complete(
    run: Invocation,
    instance: str | None,
    values: dict[str, Any],
    create: bool,  # noqa: FBT001 - as every kind of record has it
) -> tuple[str | None, dict[str, Json]]:
    keys: dict[str, Json] = {}
    domain, name = values.pop("from_libvirt", None), values.get("name")
    if domain is not None:
        keys = _from_libvirt(run, domain, values["network"], values["mac"], values["address"])
        values["network"] = None
    elif create and values["network"] is None and (values["mac"] or values["address"]):
        values["network"] = _only_network(run.daemon())
    identity = keys.pop("id", None)
    if instance is None and isinstance(identity, str):
        instance = identity
    if create and instance is None and name is not None:
        instance = _id_of_name(name)
    if create and instance is not None:
        keys.setdefault("name", instance)
    return instance, keys


def _id_of_name(name: str) -> str | None:
    return _NOT_IN_ID.sub("-", name)[:_LONGEST_ID].strip("._-") or None


def _only_network(daemon: AdminClient) -> str:
    """The one network that there is.

    Raises:
        RequestRefused: There is none, or more than one.
    """
    shapes = cast("Sequence[Mapping[str, object]]", daemon.get("/v1/networks"))
    ids = [str(cast("Mapping[str, object]", shape["record"])["id"]) for shape in shapes]
    if len(ids) == 1:
        return ids[0]
    if not ids:
        raise RequestRefused(
            "there is no network yet for --mac and --address to be in",
            hint="`imdsproxy network add --bridge DEV` makes one of a bridge",
        )
    shown = ", ".join(ids[:_NAMED]) + (", …" if len(ids) > _NAMED else "")
    raise RequestRefused(
        f"--mac and --address need a --network: there are {len(ids)}", hint=f"one of {shown}"
    )


def _from_libvirt(
    run: Invocation,
    domain: str,
    network: str | None,
    mac: str | None,
    addresses: Sequence[str] | None,
) -> dict[str, Json]:
    from imdsproxy.cli.from_libvirt import import_domain  # noqa: PLC0415 - needs libvirt

    if mac or addresses:
        raise RequestRefused(
            "--from-libvirt has the domain's own MACs",
            hint="leave --mac and --address out; a static host of libvirt's network is its address",
        )
    return import_domain(run.daemon(), run.settings.sources.libvirt.uri, domain, network)


def _network(text: str) -> object:
    return Annotated[str | None, flag("--network", "NET", text, completers.networks, "-n")]


app = make_app(
    RecordKind(
        name="instance",
        table=INSTANCE,
        names=completers.instances,
        help="Instances: add, list, show, set, remove, reopen, password.",
        new_id="Its id; made of --name, or the domain's UUID, without it.",
        remove_help="Remove instances; their guests get no more answers.",
        list_help="Every instance, or those with a port in --network.",
        show_list=show_instances,
        show=show_instance,
        complete=_complete,
        flags={
            "from_libvirt": Annotated[
                str | None,
                flag(
                    "--from-libvirt",
                    "DOMAIN",
                    "Take network cards, keys, user data and id of a domain, once; other flags of a record win.",
                ),
            ]
        },
        add_flags={
            "network": _network("The network of its port, by id or name; the only one without it.")
        },
        list_flags={"network": _network("Only those in this network.")},
    )
)


@app.command("password")
@command
def password(
    run: Invocation,
    instance: Id,
    *,
    clear: ClearPassword = False,
) -> None:
    """The password that its guest posted, encrypted with the instance's key; with --clear forget it."""
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
@command
def reopen(
    run: Invocation,
    instance: Id,
) -> None:
    """Have its boot begin anew: sealed user-data and locked trees are open until that is over."""
    order_instance(run, instance, "reopen", f"instance {instance} boots anew")
