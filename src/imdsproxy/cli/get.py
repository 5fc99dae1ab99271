"""`imdsproxy get`: the answer that a guest would get, byte for byte."""

from __future__ import annotations

import sys
from http import HTTPStatus
from typing import Annotated, TypeAlias

import typer

from imdsproxy.cli import options
from imdsproxy.cli.exitcodes import NO
from imdsproxy.cli.output import read_bytes_shape, spell_status

Path: TypeAlias = Annotated[
    str, typer.Argument(metavar="PATH", help="As the guest asks: /latest/meta-data/.")
]
Include: TypeAlias = Annotated[
    bool, typer.Option("--include", "-i", help="Status and headers first.", show_default=False)
]


@options.command
def get(
    run: options.Invocation,
    path: Path,
    network: options.Network,
    address: options.Address,
    *,
    include: Include = False,
) -> None:
    """The answer that the guest at this address would get; exit 1 from status 400 up."""
    query = {"network": network, "address": address, "path": path}
    answer = run.daemon().get("/v1/documents", query)
    status = answer["status"]
    if run.output.as_json:
        run.output.json(answer)
    else:
        if include:
            headers = answer["headers"]
            lines = [f"HTTP/1.1 {spell_status(status)}"]
            run.output.text("\n".join([*lines, *(f"{name}: {value}" for name, value in headers)]))
            run.output.text("")
        body = read_bytes_shape(answer["body"])
        run.output.raw(body)
        if sys.stdout.isatty() and body[-1:] not in {b"", b"\n"}:
            run.output.text("")  # only so that the prompt has a line of its own
    if status >= HTTPStatus.BAD_REQUEST:
        if not (include or run.output.as_json):
            sys.stderr.write(f"imdsproxy: the guest is answered {spell_status(status)}\n")
        raise typer.Exit(NO)
