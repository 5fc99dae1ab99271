"""What the flags of `add` leave out because there is only one answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, cast

from imdsproxy.errors import RequestRefused

if TYPE_CHECKING:
    from imdsproxy.cli.admin_client import AdminClient
    from imdsproxy.core.records import Json

__all__ = ["listener_on_bridge", "name_of_listener", "only_network"]

_NAMED: Final = 5
_IPV4: Final = 4


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


def listener_on_bridge(listener: Json) -> tuple[Json, str | None]:
    """The listener that goes with a bridge as it is now, and why it is of another kind than `--bridge` says."""
    from imdsproxy.core.bridge_reach import listener_of_bridge  # noqa: PLC0415 - `--help` need not
    from imdsproxy.core.model import METADATA_IPV4, InterfaceListener  # noqa: PLC0415 - as above
    from imdsproxy.host.device_addresses import device_addresses  # noqa: PLC0415 - as above

    bridge = listener.get("bridge") if isinstance(listener, dict) else None
    if not isinstance(listener, dict) or not isinstance(bridge, str):
        return listener, None
    addresses = device_addresses(bridge)
    if not isinstance(listener_of_bridge(bridge, addresses), InterfaceListener):
        return listener, None
    # A change has to take the old kind's key away (RFC 7396).
    others = {kind: None for kind in listener if kind != "interface" and len(listener) > 1}
    own = [each for each in addresses if each.version == _IPV4 and each != METADATA_IPV4]
    why = f"reached as an interface: this host has {', '.join(map(str, own))} on {bridge}"
    return {**others, "interface": bridge}, why
