"""`imdsproxy token revoke|rotate|report`: session tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, TypeAlias, cast

import typer

from imdsproxy.cli import completers, options
from imdsproxy.cli.records import exit_unless_in_force, order_instance

if TYPE_CHECKING:
    from collections.abc import Mapping

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
    from imdsproxy.cli.admin_client import path_to  # noqa: PLC0415 - `--help` need not load it
    from imdsproxy.cli.record_output import say_written  # noqa: PLC0415 - as above

    answer = run.daemon().request("POST", path_to("token-keys", "rotate"))
    done = cast("Mapping[str, object]", answer)
    say_written(run.output, f"key {done['kid']} signs tokens, {done['file']} has it", done)
    exit_unless_in_force(done)


@app.command("report")
@options.command
def report(
    run: options.Invocation,
) -> None:
    """Name guests and clients that still read without tokens, and what required tokens leave open."""
    from imdsproxy.cli.token_report_output import say_token_report  # noqa: PLC0415 - as above

    answer = cast("Mapping[str, object]", run.daemon().get("/v1/token-report"))
    if run.output.as_json:
        run.output.json(answer)
    else:
        say_token_report(run.output, answer)
