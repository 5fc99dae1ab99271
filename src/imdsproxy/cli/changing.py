"""What commands that change networks or instances have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias, cast

from imdsproxy.cli.exitcodes import NOT_IN_FORCE
from imdsproxy.errors import RequestRefused

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from imdsproxy.cli.options import Invocation
    from imdsproxy.core.records import Json

__all__ = [
    "Kind",
    "change_from_file",
    "change_one",
    "exit_unless_in_force",
    "order_instance",
    "remove_each",
]

Kind: TypeAlias = Literal["network", "instance"]


def change_one(
    run: Invocation,
    kind: Kind,
    name: str | None,
    keys: Mapping[str, Json],
    *,
    create: bool,
    clear: Sequence[str] = (),
) -> None:
    """Add a record, or change those of its keys that are given or cleared."""
    from imdsproxy.cli.admin_client import path_to  # noqa: PLC0415 - `--help` need not load it
    from imdsproxy.cli.record_output import say_written  # noqa: PLC0415 - as above

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


def change_from_file(
    run: Invocation, file: Path, *, name: str | None, keys: Mapping[str, Json], create: bool
) -> None:
    """Add the records of a file, or add and replace them: all, or none."""
    from imdsproxy.cli.record_files import (  # noqa: PLC0415 - `--help` need not load it
        read_record_file,
        render_lines,
    )
    from imdsproxy.cli.record_output import say_written  # noqa: PLC0415 - as above

    if name is not None or keys:
        raise _usage("--file", "goes with no id and no other flag of a record", "one or the other")
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


def remove_each(run: Invocation, kind: Kind, names: Sequence[str]) -> None:
    """Remove records one after the other; the first that cannot be ends it."""
    from imdsproxy.cli.admin_client import path_to  # noqa: PLC0415 - `--help` need not load it
    from imdsproxy.cli.record_output import say_written  # noqa: PLC0415 - as above

    daemon = run.daemon()
    answers: list[object] = []
    for name in names:
        answer = daemon.request("DELETE", path_to(f"{kind}s", name))
        answers.append(answer)
        if not run.output.as_json:
            written = cast("Mapping[str, object]", answer)
            say_written(run.output, f"{kind} {name} removed", written)
    if run.output.as_json:
        run.output.json(answers)
    exit_unless_in_force(*answers)


def order_instance(run: Invocation, name: str, order: str, done: str) -> None:
    """Have something done about an instance that changes no record of it.

    Args:
        run: The command.
        name: The instance's id.
        order: The last part of its route.
        done: What is said when it is done.
    """
    from imdsproxy.cli.admin_client import path_to  # noqa: PLC0415 - `--help` need not load it
    from imdsproxy.cli.record_output import say_written  # noqa: PLC0415 - as above

    answer = run.daemon().request("POST", path_to("instances", name, order))
    say_written(run.output, done, cast("Mapping[str, object]", answer))
    exit_unless_in_force(answer)


def exit_unless_in_force(*answers: object) -> None:
    """End with a status of its own where a change is stored and not in force."""
    import typer  # noqa: PLC0415 - as above

    if not all(cast("Mapping[str, object]", one)["applied"] for one in answers):
        raise typer.Exit(NOT_IN_FORCE)


def _counted(written: Mapping[str, object], kind: Kind) -> str:
    number = written[f"{kind}s"]
    return f"{number} {kind}" if number == 1 else f"{number} {kind}s"


def _usage(subject: str, reason: str, hint: str) -> RequestRefused:
    return RequestRefused(f"{subject}: {reason}" if subject else reason, hint=hint)
