"""`imdsproxy network|instance add|set|list|show|remove` and `imdsproxy instance reopen|password|move`."""

# No postponed annotations in this module: annotations in `_make_app` use local variables.
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final, TypeAlias

import typer

from imdsproxy.api.client import path_to
from imdsproxy.cli import options, record_io
from imdsproxy.cli.options import Invocation, argument, command, flag, network_flag
from imdsproxy.cli.output import Shape, decode_bytes
from imdsproxy.cli.record_flags import flags_of, keys_of, wrong_flag
from imdsproxy.errors import RequestRefused, spell_count
from imdsproxy.model.records import INSTANCE, NETWORK, PLACED_TABLES, TABLES, Json
from imdsproxy.model.records.network import LISTENER_KEYS
from imdsproxy.model.records.schema import Table

_NAMED: Final = 5
_NOT_IN_ID: Final = re.compile(r"[^A-Za-z0-9._-]+")
_LONGEST_ID: Final = 64

_Values: TypeAlias = dict[str, Any]
_Keys: TypeAlias = tuple[str | None, dict[str, Json]]
_Id: TypeAlias = Annotated[
    str, argument("ID", "The instance's id or name.", options.complete_instances)
]
_FILE: Final = {
    "file": Annotated[
        Path | None,
        flag(
            "--file -f FILE",
            "Read records in YAML or JSON (`networks:` and `instances:`); - is standard input.",
        ),
    ]
}
_CLEAR: Final = {
    "clear": Annotated[
        list[str] | None, flag("--clear KEY", "Remove a key, as user_data; may be repeated.")
    ]
}
_IfRevision: TypeAlias = Annotated[
    int | None,
    flag("--if-revision N", "In a fleet, refuse the change unless the record has this revision."),
]
_HOST: Final = {
    "host": Annotated[
        list[str] | None,
        flag("--host HOST", "In a fleet, a host that serves the instance; may be repeated."),
    ]
}
_FROM_LIBVIRT: Final = {
    "from_libvirt": Annotated[
        str | None,
        flag(
            "--from-libvirt DOMAIN",
            "Copy NICs, keys, user-data and id from a domain, once; other flags have priority.",
        ),
    ]
}


def _change(run: Invocation, kind: str, values: _Values, *, create: bool) -> None:
    name, file = values.pop("record"), values.pop("file")
    if file is not None:
        if name is not None or any(value not in (None, []) for value in values.values()):
            raise RequestRefused(
                "--file cannot be combined with an id or other flags of a record",
                hint="use --file alone, or flags without --file",
            )
        _send_file(run, file, create=create)
        return
    # `--clear` accepts keys with hyphens, as in the flags' names.
    cleared = dict.fromkeys(key.replace("-", "_") for key in values.pop("clear", None) or ())
    query = _if_revision(values.pop("if_revision", None))
    hosts = values.pop("host", None)
    if kind == "network":
        name, keys = _network_keys(name, values, create=create)
    else:
        name, keys = _instance_keys(run, name, values, create=create)
    body = {**cleared, **keys}
    if hosts:
        body["hosts"] = hosts
    if name is None:
        raise RequestRefused(
            f"the {kind}'s id is missing", hint=f"use `imdsproxy {kind} … ID`, or --file FILE"
        )
    if create:
        answer = run.api().request("POST", path_to(f"{kind}s"), body={"id": name, **body})
    elif body:
        answer = run.api().request("PATCH", path_to(f"{kind}s", name), query=query, body=body)
    else:
        raise RequestRefused("no change was given", hint=f"see `imdsproxy {kind} set --help`")
    record_io.show_written(run.output, f"{kind} {name} {'added' if create else 'changed'}", answer)


def _network_keys(name: str | None, values: _Values, *, create: bool) -> _Keys:
    """Return the network's id and the keys from the flags; a new network's id defaults to its listener's name."""
    listener = {key: values[key] for key in LISTENER_KEYS if values[key] is not None}
    if create and not listener:
        raise RequestRefused(
            "a network needs a listener: --bridge DEV | --interface DEV | --namespace NAME",
            hint="use `imdsproxy network add red --bridge br-red`, or --file FILE",
        )
    kinds = listener.keys() & {"bridge", "interface", "namespace"}
    # `--device` and `--manage-addresses` may stand alone for an existing namespace listener.
    alone = "namespace" not in kinds and listener.keys() - kinds
    if len(kinds) > 1 or (alone and (kinds or create)):
        raise wrong_flag(
            "listener",
            "a listener has exactly one kind",
            "use --namespace NAME (with --device, --manage-addresses), --interface DEV or --bridge DEV",
        )
    keys = keys_of(NETWORK, values)
    if kinds and not create:
        # A null removes a key of the old listener (RFC 7396).
        keys["listener"] = {**dict.fromkeys(LISTENER_KEYS), **listener}
    return name or (listener[kinds.pop()] if create else None) or None, keys


def _instance_keys(run: Invocation, name: str | None, values: _Values, *, create: bool) -> _Keys:
    """Return the instance's id and keys; flags override the keys of a libvirt domain."""
    keys: dict[str, Any] = {}
    domain = values.pop("from_libvirt")
    if domain is not None:
        if values["mac"] or values["address"]:
            raise RequestRefused(
                "--from-libvirt uses the domain's MACs and addresses",
                hint="omit --mac and --address; a static host of libvirt's network sets the address",
            )
        uri = run.settings.sources.libvirt.uri
        keys = record_io.import_domain(run.api(), uri, domain, values.pop("network"))
    elif create and values["network"] is None and (values["mac"] or values["address"]):
        values["network"] = _only_network(run)
    identity = keys.pop("id", None)
    if name is None:
        name = identity
    if create and name is None and values["name"] is not None:
        name = _NOT_IN_ID.sub("-", values["name"])[:_LONGEST_ID].strip("._-") or None
    if create and name is not None:
        keys.setdefault("name", name)
    return name, keys | keys_of(INSTANCE, values)


def _only_network(run: Invocation) -> str:
    ids: list[str] = [shape["record"]["id"] for shape in run.api().get("/v1/networks")]
    if len(ids) == 1:
        return ids[0]
    if not ids:
        raise RequestRefused(
            "--mac and --address need a network, but there is none yet",
            hint="`imdsproxy network add --bridge DEV` adds the network of a bridge",
        )
    shown = ", ".join(ids[:_NAMED]) + (", …" if len(ids) > _NAMED else "")
    raise RequestRefused(
        f"--mac and --address need a --network: there are {len(ids)} networks",
        hint=f"use one of {shown}",
    )


def _send_file(run: Invocation, file: Path, *, create: bool) -> None:
    """Add or replace all records of a file, or none; with `create` refuse existing records."""
    with run.output.progress() as note:
        daemon = run.api()
        tables = TABLES if daemon.of_host else PLACED_TABLES
        records = record_io.read_record_file(file, note, tables)

        def show(steps: Sequence[Shape]) -> None:
            for step in steps or (
                {"what": "waiting until the change is in force", "done": 0, "of": 0},
            ):
                note(step["what"], step["done"], step["of"])

        query = {"create": "true"} if create else {}
        answer = daemon.post_records(record_io.RecordLines(records, note), query, show)
    counted = ", ".join(spell_count(answer[f"{one}s"], one) for one in ("network", "instance"))
    record_io.show_written(run.output, f"{counted} {'added' if create else 'stored'}", answer)


def _if_revision(revision: int | None) -> dict[str, str] | None:
    return None if revision is None else {"if_revision": str(revision)}


def _remove(run: Invocation, kind: str, names: Sequence[str], query: dict[str, str] | None) -> None:
    daemon, answers = run.api(), []
    for name in names:
        answers.append(daemon.request("DELETE", path_to(f"{kind}s", name), query=query))
        if not run.output.as_json:
            record_io.say_written(run.output, f"{kind} {name} removed", answers[-1])
    if run.output.as_json:
        run.output.json(answers)
    if not all(one["applied"] for one in answers):
        raise typer.Exit(options.NOT_IN_FORCE)


def _make_app(
    kind: str,
    help_text: str,
    *,
    new_id: str,
    list_help: str,
    remove_help: str,
    table: Table[Any],
    flags: Mapping[str, object],
    add_flags: Mapping[str, object],
    list_flags: Mapping[str, object],
) -> typer.Typer:
    """Build the commands that both kinds of record share.

    Args:
        flags: Further flags of `add` and `set`: annotations by parameter name.
        add_flags: Flags of `add` that replace those from the table.
    """
    app = typer.Typer(help=help_text, no_args_is_help=True)
    names = options.complete_networks if kind == "network" else options.complete_instances
    article, other = ("a", "instances") if kind == "network" else ("an", "networks")

    def define_change(verb: str, text: str, record: object, more: Mapping[str, object]) -> None:
        of_table = dict(flags_of(table, new=verb == "add"))
        given = {"record": Annotated[str | None, record], **_FILE, **flags, **of_table, **more}
        if verb == "set":
            given["if_revision"] = _IfRevision

        @app.command(verb, help=text)
        @partial(command, flags=given)
        def change(run: Invocation, **values: Any) -> None:
            _change(run, kind, values, create=verb == "add")

    define_change(
        "add",
        f"Add {article} {kind}, or with --file many {kind}s and {other}: all or none.",
        argument("[ID]", new_id),
        add_flags,
    )
    define_change(
        "set",
        f"Change the given keys of {article} {kind} (a list as a whole), or with --file add and replace many.",
        argument("[ID]", f"The {kind}'s id or name; omit it with --file.", names),
        _CLEAR,
    )

    @app.command("list", help=list_help)
    @partial(command, flags=list_flags)
    def list_records(run: Invocation, **query: str | None) -> None:
        given = {key: value for key, value in query.items() if value is not None}
        api = run.api()
        if "host" in given and api.of_host:
            raise RequestRefused("--host needs a fleet", hint="name a hub with --fleet URL")
        run.output.answer(
            api.get(path_to(f"{kind}s"), given),
            lambda output, shapes: record_io.show_rows(output, kind, shapes),
        )

    @app.command("show", help=f"Show {article} {kind} as a record that --file accepts.")
    @command
    def show(
        run: Invocation, record: Annotated[str, argument("ID", f"The {kind}'s id or name.", names)]
    ) -> None:
        run.output.answer(
            run.api().get(path_to(f"{kind}s", record)),
            lambda output, shape: output.text(record_io.render_yaml(kind, shape)),
        )

    @app.command("remove", help=remove_help)
    @command
    def remove(
        run: Invocation,
        records: Annotated[
            list[str], argument("ID...", f"The ids or names of the {kind}s.", names)
        ],
        *,
        if_revision: _IfRevision = None,
    ) -> None:
        _remove(run, kind, records, _if_revision(if_revision))

    return app


network_app = _make_app(
    "network",
    "Manage networks: add, list, show, set, remove.",
    new_id="The network's id (default: the name of the bridge, interface or namespace).",
    list_help="List all networks with their listeners, and whether each is served.",
    remove_help="Remove networks in which no instance has a port.",
    table=NETWORK,
    flags={},
    add_flags={},
    list_flags={},
)

instance_app = _make_app(
    "instance",
    "Manage instances: add, list, show, set, remove, reopen, password, move.",
    new_id="The instance's id (default: derived from --name, or the domain's UUID).",
    list_help="List all instances, or those that match.",
    remove_help="Remove instances; their guests get no answers from then on.",
    table=INSTANCE,
    flags=_FROM_LIBVIRT | _HOST,
    add_flags={
        "network": Annotated[
            str | None,
            network_flag(
                "The network of the instance's port, by id or name (default: the only network)."
            ),
        ]
    },
    list_flags={
        "network": Annotated[str | None, network_flag("List only instances in this network.")],
        "project": Annotated[
            str | None, flag("--project ID", "List only instances of this project.")
        ],
        "host": Annotated[
            str | None, flag("--host HOST", "In a fleet, list only instances on this host.")
        ],
        "text": Annotated[
            str | None,
            flag(
                "--search WORDS",
                "List only instances with each word in an id, name, tag or address.",
            ),
        ],
    },
)


@instance_app.command("password")
@command
def password(
    run: Invocation,
    instance: _Id,
    *,
    clear: Annotated[
        bool, flag("--clear", "Remove the password, so that the guest can post another.")
    ] = False,
) -> None:
    """Show the password that a guest posted, encrypted with the instance's key; with --clear remove it."""
    route = path_to("instances", instance, "password")
    if clear:
        cleared = run.api().request("DELETE", route)
        record_io.show_written(run.output, f"password of instance {instance} cleared", cleared)
        return
    run.output.answer(
        run.api().get(route),
        lambda output, shape: output.foreign(decode_bytes(shape["password"])),
    )


@instance_app.command("reopen")
@command
def reopen(run: Invocation, instance: _Id) -> None:
    """Restart an instance's boot grace: sealed user-data and locked trees are open until it ends."""
    answer = run.api().request("POST", path_to("instances", instance, "reopen"))
    record_io.show_written(run.output, f"boot grace of instance {instance} restarted", answer)


@instance_app.command("move")
@options.fleet_command
def move(
    run: Invocation,
    instance: _Id,
    *,
    to: Annotated[
        str | None, flag("--to HOST", "The host to move the instance to; not needed with --finish.")
    ] = None,
    finish: Annotated[
        bool, flag("--finish", "The guest runs on the new host: stop serving it elsewhere.")
    ] = False,
    cancel: Annotated[
        bool, flag("--cancel", "Cancel the move: the guest stays on the old host.")
    ] = False,
    now: Annotated[
        bool,
        flag("--now", "Finish as soon as the new host serves the instance: no guest migrates."),
    ] = False,
) -> None:
    """Move an instance in a fleet: serve it on the new host too before its guest migrates; then run with --finish."""
    body = {"to": to, "finish": finish, "cancel": cancel, "now": now}
    answer = run.hubs().request("POST", path_to("instances", instance, "move"), body=body)
    where = " and ".join(answer["serving"])
    record_io.show_written(run.output, f"instance {instance} is on {where}", answer)
