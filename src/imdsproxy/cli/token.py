"""`imdsproxy token revoke|rotate|report`: session tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import typer

from imdsproxy.cli import options
from imdsproxy.cli.admin_client import path_to
from imdsproxy.cli.output import Output, Shape, clean, spell_time
from imdsproxy.cli.record_io import show_written

token_app = typer.Typer(
    help="Session tokens (IMDSv2): revoke, rotate, report.", no_args_is_help=True
)

_TREES_SHOWN: Final = 5


@token_app.command("revoke")
@options.command
def revoke(run: options.Invocation, instance: options.Instance) -> None:
    """Revoke the instance's tokens; it can get a new one at once."""
    answer = run.daemon().request("POST", path_to("instances", instance, "revoke-tokens"))
    show_written(run.output, f"all tokens of instance {instance} revoked", answer)


@token_app.command("rotate")
@options.command
def rotate(run: options.Invocation) -> None:
    """Sign tokens with a new key; existing tokens stay valid, by the two keys before it."""
    done = run.daemon().request("POST", path_to("token-keys", "rotate"))
    show_written(run.output, f"key {done['kid']} signs tokens, {done['file']} has it", done)


@token_app.command("report")
@options.command
def report(run: options.Invocation) -> None:
    """Name guests and clients that still read without tokens, and what required tokens leave open."""
    run.output.answer(run.daemon().get("/v1/token-report"), _show_report)


def _show_report(output: Output, report: Shape) -> None:
    """A line for each client of each guest, then the trees that stay open."""
    guests, one_in = report["guests"], report["one_in"]
    since = spell_time(report["since"])
    output.table(
        (row for guest in guests for row in _rows(guest, "~" if one_in > 1 else "")),
        empty=f"since {since} no read without a token was seen",
        keep=("READS", "REFUSED", "LAST"),
        right=("READS", "REFUSED"),
        spare=("LAST",),
    )
    if guests:
        output.styled(
            f"[dim]since {since}; READS and REFUSED are the guest's, its clients are samples[/]"
        )
    if one_in == 0:
        output.styled(
            "[yellow]warning:[/] only refused reads are counted, and no others",
            "[dim]hint:[/] tokens.count_reads: sampled, then imdsproxy reload, and come back after a while",
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


def _rows(guest: Shape, about: str) -> Iterator[dict[str, str]]:
    reads = guest["reads"]
    row = {
        "NETWORK": clean(guest["network"]),
        "INSTANCE": clean(guest["instance"]),
        "READS": f"{about if reads else ''}{reads}",
        "REFUSED": str(guest["refused"]),
    }
    readers = guest["readers"]
    if not readers:
        yield row | {"LAST": spell_time(guest["last_at"]), "PATH": "-", "CLIENT": "-"}
    for reader in readers:
        yield row | {
            "LAST": spell_time(reader["last_at"]),
            "PATH": f"/{clean(reader['path'])}",
            "CLIENT": clean(reader["client"]) or "-",
        }
