"""`imdsproxy doctor`: which clients would fail, and why."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

from imdsproxy.cli import options
from imdsproxy.cli.options import NO

Url: TypeAlias = Annotated[
    str | None,
    typer.Argument(
        metavar="[URL]",
        help="A server, as http://169.254.169.254 inside a guest, or Nova's.",
        show_default=False,
    ),
]
Headers: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--header",
        "-H",
        metavar="NAME: VALUE",
        help="With URL: sent with every question, as Nova needs them; may be repeated.",
        show_default=False,
    ),
]


@options.command
def doctor(
    run: options.Invocation,
    url: Url = None,
    *,
    network: options.MaybeNetwork = None,
    address: options.MaybeAddress = None,
    header: Headers = None,
) -> None:
    """Ask as the known clients do, and report which would fail, why, and what to change; exit 1 on errors.

    With --network and --from the daemon computes what it would answer that guest. With URL a server is asked.
    """
    from imdsproxy.cli import doctor_run  # noqa: PLC0415 - `--help` need not load it

    subject = doctor_run.find_subject(run, url, network, address, header or [])
    if doctor_run.has_errors(run, subject):
        raise typer.Exit(NO)
