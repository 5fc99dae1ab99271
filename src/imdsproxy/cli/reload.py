"""`imdsproxy reload`: take over changed settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, TypeAlias, cast

import typer

from imdsproxy.cli import options
from imdsproxy.cli.output import Column, Output, clean
from imdsproxy.errors import AdminUnavailable, SettingsDropped

_Shape: TypeAlias = Mapping[str, object]


@options.command
def reload(
    run: options.Invocation,
    *,
    allow_dropped: Annotated[
        bool,
        typer.Option(
            "--allow-dropped",
            help="Accept that settings files were emptied or removed, or that every policy is missing.",
            show_default=False,
        ),
    ] = False,
) -> None:
    """Have the daemon read its settings again; a broken or emptied file changes nothing and says why."""
    body = {"allow_dropped": True} if allow_dropped else None
    try:
        done = cast("_Shape", run.daemon().request("POST", "/v1/reload", body=body))
    except AdminUnavailable as error:
        if run.socket is None and (empty := sorted(run.load().empty)):
            # It may have named the socket.
            raise SettingsDropped(
                f"{empty[0]} holds no settings, and {error.message}",
                hint="restore the file, or name the daemon's socket with --socket",
            ) from error
        raise
    if run.output.as_json:
        run.output.json(done)
    else:
        show_reload(run.output, done)


def show_reload(output: Output, done: _Shape) -> None:
    """What changed, and what still needs a restart."""
    columns = (
        Column("SETTING", keep=True),
        Column("BEFORE"),
        Column("NOW"),
        Column("TAKEN OVER"),
    )
    waiting = set(cast("Sequence[str]", done["restart_needed"]))
    rows = [
        (
            clean(change["path"]),
            clean(change["before"]),
            clean(change["after"]),
            "[yellow]at the next restart[/]"
            if change["path"] in waiting
            else f"[green]{'by a reload' if change['change'] == 'reload' else 'at once'}[/]",
        )
        for change in cast("Sequence[_Shape]", done["changes"])
    ]
    output.table(columns, rows, empty="no setting has changed")
    if done["haproxy_reloaded"]:
        output.styled("HAProxy was reloaded.")
    pending = cast("Sequence[str]", done["pending"])
    if pending:
        output.styled("[yellow]HAProxy has not taken it over:[/]")
    for reason in pending:
        output.styled(f"  {clean(reason)}")
