"""`imdsproxy network add|list|show|set|remove`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from imdsproxy.cli import completers
from imdsproxy.cli.record_output import show_network, show_networks
from imdsproxy.cli.records import RecordKind, make_app
from imdsproxy.core.records import NETWORK, Json
from imdsproxy.core.records.network import LISTENER_KEYS
from imdsproxy.errors import RequestRefused

if TYPE_CHECKING:
    from imdsproxy.cli.options import Invocation


def _complete(
    _run: Invocation,
    network: str | None,
    values: dict[str, Any],
    create: bool,  # noqa: FBT001 - as every kind of record has it
) -> tuple[str | None, dict[str, Json]]:
    if create and not any(values.get(key) is not None for key in LISTENER_KEYS):
        raise RequestRefused(
            "a network needs a listener: --bridge DEV | --interface DEV | --namespace NAME",
            hint="`imdsproxy network add red --bridge br-red`, or --file FILE",
        )
    listener = values.get("bridge") or values.get("interface") or values.get("namespace")
    return network or (listener if create else None), {}


app = make_app(
    RecordKind(
        name="network",
        table=NETWORK,
        names=completers.networks,
        help="Networks: add, list, show, set, remove.",
        new_id="Its id; the name of the bridge, interface or namespace without it.",
        remove_help="Remove networks that no instance has a port in.",
        list_help="Every network, how it is reached, and whether it is served.",
        show_list=show_networks,
        show=show_network,
        complete=_complete,
    )
)
