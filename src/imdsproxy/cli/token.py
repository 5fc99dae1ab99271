"""`imdsproxy token revoke|rotate|report`: session tokens."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated, Final, TypeAlias

import typer

from imdsproxy.cli import completers, options
from imdsproxy.cli.admin_client import path_to
from imdsproxy.cli.output import Column, Output, Shape, clean
from imdsproxy.cli.record_output import say_written
from imdsproxy.cli.records import exit_unless_in_force, order_instance

app = typer.Typer(help="Session tokens (IMDSv2): revoke, rotate, report.", no_args_is_help=True)

Id: TypeAlias = Annotated[
    str,
    typer.Argument(
        metavar="INSTANCE", help="The instance's id or name.", autocompletion=completers.instances
    ),
]


@app.command("revoke")
@options.command
def revoke(
    run: options.Invocation,
    instance: Id,
) -> None:
    """Revoke the instance's tokens; it can get a new one at once."""
    order_instance(run, instance, "revoke-tokens", f"all tokens of instance {instance} revoked")


@app.command("rotate")
@options.command
def rotate(
    run: options.Invocation,
) -> None:
    """Sign tokens with a new key; existing tokens stay valid, by the two keys before it."""
    answer = run.daemon().request("POST", path_to("token-keys", "rotate"))
    done = answer
    say_written(run.output, f"key {done['kid']} signs tokens, {done['file']} has it", done)
    exit_unless_in_force(done)


@app.command("report")
@options.command
def report(
    run: options.Invocation,
) -> None:
    """Name guests and clients that still read without tokens, and what required tokens leave open."""
    answer = run.daemon().get("/v1/token-report")
    if run.output.as_json:
        run.output.json(answer)
    else:
        say_token_report(run.output, answer)


_TREES_SHOWN: Final = 5

_COLUMNS: Final = (
    Column("NETWORK"),
    Column("INSTANCE"),
    Column("READS", keep=True, right=True),
    Column("REFUSED", keep=True, right=True),
    Column("LAST", keep=True, spare=True),
    Column("PATH"),
    Column("CLIENT"),
)


def say_token_report(output: Output, report: Shape) -> None:
    """A line for each client of each guest, then the trees that stay open.

    Args:
        output: Where to.
        report: The answer of `GET /v1/token-report`.
    """
    guests, one_in = report["guests"], report["one_in"]
    since = _time(report["since"])
    output.table(
        _COLUMNS,
        (row for guest in guests for row in _rows(guest, "~" if one_in > 1 else "")),
        empty=f"since {since} no read without a token was seen",
    )
    if guests:
        output.styled(
            f"[dim]since {since}; READS and REFUSED are the guest's, its clients are samples[/]"
        )
    if one_in == 0:
        output.styled("[yellow]warning:[/] only refused reads are counted, and no others")
        output.styled(
            "[dim]hint:[/] tokens.count_reads: sampled, then imdsproxy reload, and come back after a while"
        )
    elif one_in > 1:
        output.styled(
            f"[dim]READS is about: one read in {one_in} is counted, by chance. Frequent readers are seen, "
            "rare ones may not be: tokens.count_reads: all counts each[/]"
        )
    trees = report["open_trees"][:_TREES_SHOWN]
    for one in trees:
        output.styled(
            f"[yellow]warning:[/] {clean(one['tree'])} gives instance {clean(one['instance'])} in "
            f"{clean(one['network'])} the user-data that another tree denies, or gives for a token only"
        )
    more = report["open_tree_count"] - len(trees)
    if more > 0:
        output.styled(f"[yellow]warning:[/] so do {more} more")
    if trees:
        output.styled(
            "[dim]hint:[/] policy: openstack_tokens, nocloud_tokens or seal_user_data lock it after the boot, "
            "and paths at once"
        )


def _rows(guest: Shape, about: str) -> Iterator[tuple[str, ...]]:
    who = (clean(guest["network"]), clean(guest["instance"]))
    reads = guest["reads"]
    counts = (f"{about if reads else ''}{reads}", str(guest["refused"]))
    readers = guest["readers"]
    if not readers:
        yield (*who, *counts, _time(guest["last_at"]), "-", "-")
    for reader in readers:
        path, client = f"/{clean(reader['path'])}", clean(reader["client"]) or "-"
        yield (*who, *counts, _time(reader["last_at"]), path, client)


def _time(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC).astimezone():%Y-%m-%d %H:%M:%S}"
