"""What the flags of `add` leave out because there is only one answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, cast

from imdsproxy.errors import RequestRefused

if TYPE_CHECKING:
    from imdsproxy.cli.admin_client import AdminClient
    from imdsproxy.core.records import Json

_NAMED: Final = 5


def only_network(daemon: AdminClient) -> str:
    """The one network that there is.

    Raises:
        RequestRefused: There is none, or more than one.
    """
    shapes = cast("Sequence[Mapping[str, object]]", daemon.get("/v1/networks"))
    ids = [str(cast("Mapping[str, object]", shape["record"])["id"]) for shape in shapes]
    if len(ids) == 1:
        return ids[0]
    if not ids:
        raise RequestRefused(
            "there is no network yet for --mac and --address to be in",
            hint="`imdsproxy network add --bridge DEV` makes one of a bridge",
        )
    shown = ", ".join(ids[:_NAMED]) + (", …" if len(ids) > _NAMED else "")
    raise RequestRefused(
        f"--mac and --address need a --network: there are {len(ids)}", hint=f"one of {shown}"
    )


def name_of_listener(listener: Json) -> str | None:
    """The name of the bridge, interface or namespace, which is the network's id where none is given."""
    kinds = listener if isinstance(listener, dict) else {}
    named = (kinds.get(kind) for kind in ("bridge", "interface", "namespace"))
    return next((name for name in named if isinstance(name, str)), None)
