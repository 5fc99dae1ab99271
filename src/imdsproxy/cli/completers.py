"""What the shell may complete: names that the daemon knows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import typer

from imdsproxy.errors import ImdsproxyError

_TIMEOUT_S: Final = 1.0
"""An operator waits for it at a prompt."""


def networks(ctx: typer.Context, incomplete: str) -> list[str]:
    """Ids and names of networks that begin so."""
    return _words(ctx, "networks", incomplete)


def instances(ctx: typer.Context, incomplete: str) -> list[str]:
    """Ids and names of instances that begin so."""
    return _words(ctx, "instances", incomplete)


def _words(context: typer.Context, kind: str, incomplete: str) -> list[str]:
    from imdsproxy.cli.admin_client import AdminClient, path_to  # noqa: PLC0415 - as all commands
    from imdsproxy.cli.options import Invocation  # noqa: PLC0415 - as above

    given = _given(context)
    try:
        socket = given.get("socket") or Invocation(given.get("config")).settings.admin_socket
        client = AdminClient(socket, _TIMEOUT_S)
        shapes = client.get(path_to(kind))
    except ImdsproxyError:
        # There is no place for an error: the shell puts all output into the command line.
        return []
    records = [shape["record"] for shape in shapes]
    words = [record["id"] for record in records] + [record.get("name", "") for record in records]
    return [word for word in dict.fromkeys(words) if word and word.startswith(incomplete)]


def _given(context: typer.Context) -> dict[str, Path]:
    """`--socket` and `--config`, where they stand before the word that is completed."""
    found: dict[str, Path] = {}
    # Those around it are click's, of which typer has brought its own lately.
    place: object = context
    while place is not None:
        params: Mapping[str, Any] = getattr(place, "params", {})
        for name in ("socket", "config"):
            value = params.get(name)
            if value is not None:
                found.setdefault(name, Path(str(value)))
        place = getattr(place, "parent", None)
    return found
