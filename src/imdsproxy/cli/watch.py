"""`imdsproxy watch`: guests' requests as they are answered."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Final, TypeAlias

from imdsproxy.cli import completers, options
from imdsproxy.cli.output import Output, Shape

_EVERY_S: Final = 0.5

Network: TypeAlias = Annotated[
    str | None,
    options.flag("--network", "NET", "Only the guests of this network.", completers.networks, "-n"),
]
Instance: TypeAlias = Annotated[
    str | None,
    options.flag("--instance", "ID", "Only this instance, by id or name.", completers.instances),
]


@options.command
def watch(
    run: options.Invocation,
    *,
    network: Network = None,
    instance: Instance = None,
) -> None:
    """Every request of a guest as it is answered, until Ctrl-C; with --json a line each."""
    daemon = run.daemon()
    chosen = {"network": network, "instance": instance}
    query = {name: value for name, value in chosen.items() if value is not None}

    def ask(cursor: int | None) -> Shape:
        more = {} if cursor is None else {"cursor": str(cursor)}
        shape: Shape = daemon.get("/v1/watch", query | more)
        return shape

    follow(ask, run.output, time.sleep)


def follow(
    ask: Callable[[int | None], Shape], output: Output, sleep: Callable[[float], None]
) -> None:
    """Print requests for ever; HAProxy itself spells what is not printable as `#XX`.

    Args:
        ask: What happened since a cursor.
        output: Where to.
        sleep: Waits for so many seconds; what it raises ends it.
    """
    cursor: int | None = None
    while True:
        answer = ask(cursor)
        lines = [] if cursor is not None or output.as_json else [_HEAD]
        cursor = answer["cursor"]
        if answer["missed"]:
            lines.append('{"missed": true}' if output.as_json else "… some were too many to show")
        requests = answer["requests"]
        lines += [_line_of(one, as_json=output.as_json) for one in requests]
        # At once, also into a pipe.
        output.raw("".join(f"{line}\n" for line in lines).encode())
        sleep(_EVERY_S)


_HEAD: Final = (
    f"{'TIME':12} {'NETWORK':16} {'ADDRESS':15} {'INSTANCE':20} {'BY':9} {'MS':>5} {'':3} REQUEST"
)


def _line_of(request: Shape, *, as_json: bool) -> str:
    if as_json:
        import json  # noqa: PLC0415 - `--help` need not load it

        shown = {name: value for name, value in request.items() if name != "number"}
        return json.dumps(shown, ensure_ascii=True)
    at = datetime.fromtimestamp(request["at"], UTC).astimezone()
    who = f"{request['network'] or '-':16} {request['address'] or '-':15} {request['instance'] or '-':20}"
    how = f"{request['answered_by']:9} {request['milliseconds']:>5} {request['status']:3}"
    asked = f"{request['method'] or '-'} {request['path']}"
    return f"{at:%H:%M:%S}.{at.microsecond // 1000:03} {who} {how} {asked}"
