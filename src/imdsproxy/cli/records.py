"""Commands of every kind of record: add, set, list, show and remove."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, TypeAlias, cast

import typer

from imdsproxy.cli.admin_client import path_to
from imdsproxy.cli.exitcodes import NOT_IN_FORCE
from imdsproxy.cli.options import Invocation, command, flag
from imdsproxy.cli.output import Output
from imdsproxy.cli.record_files import read_record_file, render_lines
from imdsproxy.cli.record_flags import flags_of, keys_of
from imdsproxy.cli.record_output import say_written
from imdsproxy.core.records.schema import Json, Table
from imdsproxy.errors import RequestRefused

Shape: TypeAlias = Mapping[str, object]
"""A report of a record, as the admin API has it in JSON."""

Complete: TypeAlias = Callable[
    [Invocation, str | None, dict[str, Any], bool], tuple[str | None, dict[str, Json]]
]
"""Finds out what flags do not give: the id, and keys over which flags win.

Takes the run, the id, the flags' values, which it may change, and whether the record is new."""

_File: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--file",
        "-f",
        metavar="FILE",
        help="Records in YAML or JSON (`networks:` and `instances:`); - is standard input.",
        show_default=False,
    ),
]
_CLEAR: Final = Annotated[
    list[str] | None, flag("--clear", "KEY", "Clear a key, as user_data; may be repeated.")
]


@dataclass(frozen=True, slots=True)
class RecordKind:
    """One kind of record.

    Attributes:
        name: In the singular, as in the command's name.
        table: Its keys.
        names: Completes ids and names.
        help: Of the group of commands.
        new_id: What the argument of `add` is.
        remove_help: What `remove` does.
        list_help: What `list` does.
        show_list: Prints all of them.
        show: Prints one.
        complete: For `add` and `set`.
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
    show_list: Callable[[Output, Sequence[Shape]], None]
    show: Callable[[Output, Shape], None]
    complete: Complete
    flags: Mapping[str, object] = field(default_factory=dict)
    add_flags: Mapping[str, object] = field(default_factory=dict)
    list_flags: Mapping[str, object] = field(default_factory=dict)

    @property
    def other(self) -> str:
        """The other kind, which a file may hold too."""
        return "instances" if self.name == "network" else "networks"

    def argument(self, metavar: str, text: str, *, complete: bool = True) -> Any:  # noqa: ANN401 - as typer has it
        """An argument that names a record, or some."""
        return typer.Argument(
            metavar=metavar,
            help=text,
            show_default=False,
            autocompletion=self.names if complete else None,
        )


def make_app(kind: RecordKind) -> typer.Typer:
    """The group of commands."""
    app = typer.Typer(help=kind.help, no_args_is_help=True)
    article = "an" if kind.name == "instance" else "a"
    _add_change(
        app,
        kind,
        f"Add {article} {kind.name}; with --file many {kind.name}s and {kind.other}, all or none.",
        create=True,
    )
    _add_change(
        app,
        kind,
        f"Change what is given of {article} {kind.name} (a list as a whole); with --file add and replace many.",
        create=False,
    )
    _add_reading(app, kind)
    return app


def _add_change(app: typer.Typer, kind: RecordKind, text: str, *, create: bool) -> None:
    def change(
        run: Invocation,
        record: str | None = None,
        *,
        file: _File = None,
        **values: Any,  # noqa: ANN401 - of flags
    ) -> None:
        if file is not None:
            if record is not None or any(value not in (None, []) for value in values.values()):
                raise RequestRefused(
                    "--file: goes with no id and no other flag of a record", hint="one or the other"
                )
            _change_from_file(run, file, create=create)
            return
        cleared = values.pop("clear", None) or ()
        found, keys = kind.complete(run, record, values, create)
        keys |= keys_of(kind.table, values, changing=not create)
        _change_one(run, kind.name, found, keys, create=create, clear=cleared)

    argument = (
        kind.argument("[ID]", kind.new_id, complete=False)
        if create
        else kind.argument("[ID]", f"The {kind.name}'s id or name; none with --file.")
    )
    flags = {**kind.flags, **dict(flags_of(kind.table))}
    flags |= kind.add_flags if create else {"clear": _CLEAR}
    described = command(change, flags, record=Annotated[str | None, argument])
    app.command("add" if create else "set", help=text)(described)


def _add_reading(app: typer.Typer, kind: RecordKind) -> None:
    one = Annotated[str, kind.argument("ID", f"The {kind.name}'s id or name.")]
    many = Annotated[list[str], kind.argument("ID...", "Their ids or names.")]

    def list_(run: Invocation, **query: object) -> None:
        given = {name: str(value) for name, value in query.items() if value is not None}
        shapes = cast("Sequence[Shape]", run.daemon().get(f"/v1/{kind.name}s", given))
        if run.output.as_json:
            run.output.json(shapes)
        else:
            kind.show_list(run.output, shapes)

    def show(run: Invocation, record: str) -> None:
        shape = cast("Shape", run.daemon().get(path_to(f"{kind.name}s", record)))
        if run.output.as_json:
            run.output.json(shape)
        else:
            kind.show(run.output, shape)

    def remove(run: Invocation, records: list[str]) -> None:
        daemon = run.daemon()
        answers: list[object] = []
        # The first that cannot be removed ends it.
        for name in records:
            answers.append(daemon.request("DELETE", path_to(f"{kind.name}s", name)))
            if not run.output.as_json:
                say_written(run.output, f"{kind.name} {name} removed", cast("Shape", answers[-1]))
        if run.output.as_json:
            run.output.json(answers)
        exit_unless_in_force(*answers)

    app.command("list", help=kind.list_help)(command(list_, kind.list_flags))
    app.command("show", help=f"One {kind.name} as a record that --file takes back.")(
        command(show, record=one)
    )
    app.command("remove", help=kind.remove_help)(command(remove, records=many))


def _change_one(
    run: Invocation,
    kind: str,
    name: str | None,
    keys: Mapping[str, Json],
    *,
    create: bool,
    clear: Sequence[str] = (),
) -> None:
    """Add a record, or change those of its keys that are given or cleared."""
    if name is None:
        raise _usage("", f"the {kind}'s id is missing", f"imdsproxy {kind} … ID, or --file FILE")
    # Flags have hyphens where keys have underscores.
    body = {**dict.fromkeys(key.replace("-", "_") for key in clear), **keys}
    if create:
        route = path_to(f"{kind}s")
        answer = run.daemon().request("POST", route, body={"id": name, **body})
    elif body:
        answer = run.daemon().request("PATCH", path_to(f"{kind}s", name), body=body)
    else:
        raise _usage("", "nothing to change was given", f"see `imdsproxy {kind} set --help`")
    done = "added" if create else "changed"
    what = f"{kind} {name} {done}"
    say_written(run.output, what, cast("Mapping[str, object]", answer))
    exit_unless_in_force(answer)


def _change_from_file(run: Invocation, file: Path, *, create: bool) -> None:
    """Add the records of a file, or add and replace them: all, or none."""
    query = {"create": "true"} if create else {}
    with run.output.progress() as note:
        records = read_record_file(file, note)

        def show(steps: Sequence[Mapping[str, object]]) -> None:
            for step in steps or ({"what": "waiting until it is in force", "done": 0, "of": 0},):
                note(str(step["what"]), int(str(step["done"])), int(str(step["of"])))

        answer = run.daemon().post_records(render_lines(records, note), query, show)
    written = cast("Mapping[str, object]", answer)
    counts = f"{_counted(written, 'network')}, {_counted(written, 'instance')}"
    say_written(run.output, f"{counts} {'added' if create else 'stored'}", written)
    exit_unless_in_force(written)


def order_instance(run: Invocation, name: str, order: str, done: str) -> None:
    """Have something done about an instance that changes no record of it.

    Args:
        run: The command.
        name: The instance's id.
        order: The last part of its route.
        done: The message once it is done.
    """
    answer = run.daemon().request("POST", path_to("instances", name, order))
    say_written(run.output, done, cast("Mapping[str, object]", answer))
    exit_unless_in_force(answer)


def exit_unless_in_force(*answers: object) -> None:
    """End with a status of its own where a change is stored and not in force."""
    if not all(cast("Mapping[str, object]", one)["applied"] for one in answers):
        raise typer.Exit(NOT_IN_FORCE)


def _counted(written: Mapping[str, object], kind: str) -> str:
    number = written[f"{kind}s"]
    return f"{number} {kind}" if number == 1 else f"{number} {kind}s"


def _usage(subject: str, reason: str, hint: str) -> RequestRefused:
    return RequestRefused(f"{subject}: {reason}" if subject else reason, hint=hint)
