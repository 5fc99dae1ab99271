"""Which network a namespace of Neutron's agents stands for: pure."""

import re
from typing import Final

from imdsproxy.core.model import NamespaceListener, Network, NetworkId, Scope

ROUTER_PREFIX: Final = "qrouter-"
"""What the L3 agent's namespaces begin with; its others (`snat-`, `fip-`) have no guests behind them."""

_UUID: Final = re.compile("[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def network_of(name: str, *, routers: bool) -> Network | None:
    """The record of a namespace; `None` where it is not to be served."""
    if routers and (router := router_of(name)) is not None:
        listener = NamespaceListener(name, redirected=True)
        return Network(router, listener, scope=Scope.ROUTER)
    return None


def router_of(name: str) -> NetworkId | None:
    """The router of a namespace of the L3 agent's; `None` for others."""
    return _id_behind(ROUTER_PREFIX, name)


def _id_behind(prefix: str, name: str) -> NetworkId | None:
    found = name.removeprefix(prefix)
    return NetworkId(found) if found != name and _UUID.fullmatch(found) else None
