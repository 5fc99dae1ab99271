"""`imdsproxy network|instance add|set|list|show|remove`, `instance reopen` and `instance password`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, TypeAlias

import typer

from imdsproxy.cli import record_io
from imdsproxy.cli.admin_client import AdminClient, path_to
from imdsproxy.cli.options import (
    Invocation,
    argument,
    command,
    complete_instances,
    complete_networks,
    flag,
    switch,
)
from imdsproxy.cli.output import Shape, read_bytes_shape
from imdsproxy.cli.record_flags import flags_of, keys_of, network_flag
from imdsproxy.core.records import INSTANCE, NETWORK, Json
from imdsproxy.core.records.network import LISTENER_KEYS
from imdsproxy.core.records.schema import Table
from imdsproxy.errors import RequestRefused

_NAMED: Final = 5
_NOT_IN_ID: Final = re.compile(r"[^A-Za-z0-9._-]+")
_LONGEST_ID: Final = 64

_Values: TypeAlias = dict[str, Any]
_Completed: TypeAlias = tuple[str | None, dict[str, Json]]
_File: TypeAlias = Annotated[
    Path | None,
    flag(
        "--file",
        "FILE",
        "Records in YAML or JSON (`networks:` and `instances:`); - is standard input.",
        short="-f",
    ),
]
_CLEAR: Final = {
    "clear": Annotated[
        list[str] | None, flag("--clear", "KEY", "Clear a key, as user_data; may be repeated.")
    ]
}
_Id: TypeAlias = Annotated[str, argument("ID", "The instance's id or name.", complete_instances)]


def _complete_network(
    _run: Invocation, network: str | None, values: _Values, *, create: bool
) -> _Completed:
    if create and not any(values.get(key) is not None for key in LISTENER_KEYS):
        raise RequestRefused(
            "a network needs a listener: --bridge DEV | --interface DEV | --namespace NAME",
            hint="`imdsproxy network add red --bridge br-red`, or --file FILE",
        )
    listener = values.get("bridge") or values.get("interface") or values.get("namespace")
    return network or (listener if create else None), {}


def _complete_instance(
    run: Invocation, instance: str | None, values: _Values, *, create: bool
) -> _Completed:
    keys: dict[str, Json] = {}
    domain, name = values.pop("from_libvirt", None), values.get("name")
    if domain is not None:
        keys = _from_libvirt(run, domain, values)
        values["network"] = None
    elif create and values["network"] is None and (values["mac"] or values["address"]):
        values["network"] = _only_network(run.daemon())
    identity = keys.pop("id", None)
    if instance is None and isinstance(identity, str):
        instance = identity
    if create and instance is None and name is not None:
        instance = _NOT_IN_ID.sub("-", name)[:_LONGEST_ID].strip("._-") or None
    if create and instance is not None:
        keys.setdefault("name", instance)
    return instance, keys


def _only_network(daemon: AdminClient) -> str:
    ids: list[str] = [shape["record"]["id"] for shape in daemon.get("/v1/networks")]
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


def _from_libvirt(run: Invocation, domain: str, values: _Values) -> dict[str, Json]:
    from imdsproxy.cli.from_libvirt import import_domain  # noqa: PLC0415 - needs libvirt

    if values["mac"] or values["address"]:
        raise RequestRefused(
            "--from-libvirt has the domain's own MACs",
            hint="leave --mac and --address out; a static host of libvirt's network is its address",
        )
    return import_domain(run.daemon(), run.settings.sources.libvirt.uri, domain, values["network"])


@dataclass(frozen=True, slots=True)
class _Kind:
    """One kind of record.

    Attributes:
        name: In the singular, as in the command's name.
        table: Its keys.
        names: Completes ids and names.
        help: Of the group of commands.
        new_id: What the argument of `add` is.
        remove_help: What `remove` does.
        list_help: What `list` does.
        row: Of `list`.
        notes: Comments of `show`.
        complete: Finds out for `add` and `set` what flags do not give: the id, and keys over which flags win. It may
            change the flags' values.
        flags: More flags of `add` and `set`: annotations by the parameter's name.
        add_flags: The same of `add` alone, where a flag is described in another way.
        list_flags: Flags of `list`, which go into the query.
    """

    name: str
    table: Table[Any]
    names: Callable[..., list[str]]
    help: str
    new_id: str
    remove_help: str
    list_help: str
    row: Callable[[Shape], Mapping[str, str]]
    notes: Callable[[Shape], Mapping[str, Any]]
    complete: Callable[..., _Completed]
    flags: Mapping[str, object] = field(default_factory=dict)
    add_flags: Mapping[str, object] = field(default_factory=dict)
    list_flags: Mapping[str, object] = field(default_factory=dict)


def _make_app(kind: _Kind) -> typer.Typer:
    name, route = kind.name, f"/v1/{kind.name}s"
    article, other = ("an", "networks") if name == "instance" else ("a", "instances")
    flags = {**kind.flags, **dict(flags_of(kind.table))}

    def change(*, create: bool) -> Callable[..., None]:
        def run_change(
            run: Invocation,
            record: str | None = None,
            *,
            file: _File = None,
            **values: Any,  # noqa: ANN401 - of flags
        ) -> None:
            _change(run, kind, record, file, values, create=create)

        return run_change

    def list_(run: Invocation, **query: object) -> None:
        given = {key: str(value) for key, value in query.items() if value is not None}
        run.output.answer(
            run.daemon().get(route, given),
            lambda output, shapes: record_io.show_rows(output, name, map(kind.row, shapes)),
        )

    def show(run: Invocation, record: str) -> None:
        run.output.answer(
            run.daemon().get(path_to(f"{name}s", record)),
            lambda output, shape: output.text(
                record_io.render_yaml(name, shape["record"], kind.notes(shape))
            ),
        )

    def remove(run: Invocation, records: list[str]) -> None:
        daemon, answers = run.daemon(), []
        # The first that cannot be removed ends it.
        for one in records:
            answers.append(daemon.request("DELETE", path_to(f"{name}s", one)))
            if not run.output.as_json:
                record_io.say_written(run.output, f"{name} {one} removed", answers[-1])
        if run.output.as_json:
            run.output.json(answers)
        record_io.exit_unless_in_force(*answers)

    app = typer.Typer(help=kind.help, no_args_is_help=True)
    new = argument("[ID]", kind.new_id)
    known = argument("[ID]", f"The {name}'s id or name; none with --file.", kind.names)
    one = argument("ID", f"The {name}'s id or name.", kind.names)
    some = argument("ID...", "Their ids or names.", kind.names)
    for verb, function, described in (
        (
            "add",
            command(
                change(create=True),
                flags={**flags, **kind.add_flags},
                record=Annotated[str | None, new],
            ),
            f"Add {article} {name}; with --file many {name}s and {other}, all or none.",
        ),
        (
            "set",
            command(
                change(create=False), flags=flags | _CLEAR, record=Annotated[str | None, known]
            ),
            f"Change what is given of {article} {name} (a list as a whole); with --file add and replace many.",
        ),
        ("list", command(list_, flags=kind.list_flags), kind.list_help),
        (
            "show",
            command(show, record=Annotated[str, one]),
            f"One {name} as a record that --file takes back.",
        ),
        ("remove", command(remove, records=Annotated[list[str], some]), kind.remove_help),
    ):
        app.command(verb, help=described)(function)
    return app


def _change(
    run: Invocation,
    kind: _Kind,
    name: str | None,
    file: Path | None,
    values: _Values,
    *,
    create: bool,
) -> None:
    """Add a record, change those of its keys that are given or cleared, or send the records of a file."""
    if file is not None:
        if name is not None or any(value not in (None, []) for value in values.values()):
            raise RequestRefused(
                "--file: goes with no id and no other flag of a record", hint="one or the other"
            )
        _send_file(run, file, create=create)
        return
    cleared: Sequence[str] = values.pop("clear", None) or ()
    name, keys = kind.complete(run, name, values, create=create)
    keys |= keys_of(kind.table, values, changing=not create)
    if name is None:
        raise RequestRefused(
            f"the {kind.name}'s id is missing", hint=f"imdsproxy {kind.name} … ID, or --file FILE"
        )
    # Flags have hyphens where keys have underscores.
    body = {**dict.fromkeys(key.replace("-", "_") for key in cleared), **keys}
    if create:
        answer = run.daemon().request("POST", path_to(f"{kind.name}s"), body={"id": name, **body})
    elif body:
        answer = run.daemon().request("PATCH", path_to(f"{kind.name}s", name), body=body)
    else:
        raise RequestRefused(
            "nothing to change was given", hint=f"see `imdsproxy {kind.name} set --help`"
        )
    record_io.show_written(
        run.output, f"{kind.name} {name} {'added' if create else 'changed'}", answer
    )


def _send_file(run: Invocation, file: Path, *, create: bool) -> None:
    """Add the records of a file, or add and replace them: all, or none."""
    with run.output.progress() as note:
        records = record_io.read_record_file(file, note)

        def show(steps: Sequence[Shape]) -> None:
            for step in steps or ({"what": "waiting until it is in force", "done": 0, "of": 0},):
                note(step["what"], step["done"], step["of"])

        query = {"create": "true"} if create else {}
        answer = run.daemon().post_records(record_io.render_lines(records, note), query, show)
    counts = [(answer[f"{one}s"], one) for one in ("network", "instance")]
    counted = ", ".join(f"{n} {one}" if n == 1 else f"{n} {one}s" for n, one in counts)
    record_io.show_written(run.output, f"{counted} {'added' if create else 'stored'}", answer)


network_app = _make_app(
    _Kind(
        name="network",
        table=NETWORK,
        names=complete_networks,
        help="Networks: add, list, show, set, remove.",
        new_id="Its id; the name of the bridge, interface or namespace without it.",
        remove_help="Remove networks that no instance has a port in.",
        list_help="Every network, how it is reached, and whether it is served.",
        row=record_io.network_row,
        notes=record_io.network_notes,
        complete=_complete_network,
    )
)

instance_app = _make_app(
    _Kind(
        name="instance",
        table=INSTANCE,
        names=complete_instances,
        help="Instances: add, list, show, set, remove, reopen, password.",
        new_id="Its id; made of --name, or the domain's UUID, without it.",
        remove_help="Remove instances; their guests get no more answers.",
        list_help="Every instance, or those with a port in --network.",
        row=record_io.instance_row,
        notes=record_io.instance_notes,
        complete=_complete_instance,
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
            "network": network_flag(
                "The network of its port, by id or name; the only one without it."
            )
        },
        list_flags={"network": network_flag("Only those in this network.")},
    )
)


@instance_app.command("password")
@command
def password(
    run: Invocation,
    instance: _Id,
    *,
    clear: Annotated[
        bool, switch("--clear", "Forget it, so that the guest can post another.")
    ] = False,
) -> None:
    """The password that its guest posted, encrypted with the instance's key; with --clear forget it."""
    route = path_to("instances", instance, "password")
    if clear:
        cleared = run.daemon().request("DELETE", route)
        record_io.show_written(run.output, f"password of instance {instance} cleared", cleared)
        return
    run.output.answer(
        run.daemon().get(route),
        lambda output, shape: output.foreign(read_bytes_shape(shape["password"])),
    )


@instance_app.command("reopen")
@command
def reopen(run: Invocation, instance: _Id) -> None:
    """Have its boot begin anew: sealed user-data and locked trees are open until that is over."""
    answer = run.daemon().request("POST", path_to("instances", instance, "reopen"))
    record_io.show_written(run.output, f"instance {instance} boots anew", answer)
