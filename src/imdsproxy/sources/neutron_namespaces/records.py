"""Which network a namespace of Neutron's agents stands for: pure."""

import re
from dataclasses import dataclass
from typing import Final

from imdsproxy.core.model import (
    METADATA_IPV4,
    METADATA_PORT,
    NamespaceListener,
    Network,
    NetworkId,
    Scope,
)

ROUTER_PREFIX: Final = "qrouter-"
"""What the L3 agent's namespaces begin with; its others (`snat-`, `fip-`) have no guests behind them."""

DHCP_PREFIX: Final = "qdhcp-"

_UUID: Final = re.compile("[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_BIND: Final = re.compile(
    rf"^\s*bind {re.escape(f'{METADATA_IPV4}:{METADATA_PORT}')}$", re.MULTILINE
)
_IDENTITY: Final = re.compile(
    rf"^\s*http-request (?:set|add)-header X-Neutron-(Network|Router)-ID ({_UUID.pattern})$",
    re.MULTILINE,
)
_PID_FILE: Final = re.compile(r"^\s*pidfile\s+(/.+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class DhcpProxy:
    """What the DHCP agent has configured a HAProxy for.

    The agent writes a file for it where guests are to get metadata in the network's own namespace, and removes it where
    they are not: the network got a router, and the agent's settings do not force metadata.

    Attributes:
        id: Of the network; of the router where the network is one that leads from a router to metadata.
        pid_file: Where the pid of the HAProxy is, or of what stands there in its place.
    """

    id: NetworkId
    scope: Scope
    pid_file: str

    @property
    def namespace(self) -> str | None:
        """Its name; `None` where only the process shows it."""
        return f"{DHCP_PREFIX}{self.id}" if self.scope is Scope.NETWORK else None

    def network_in(self, namespace: str) -> Network:
        """The record of the namespace that it is for."""
        return Network(self.id, NamespaceListener(namespace), scope=self.scope)


def parse_proxy(text: str) -> DhcpProxy | None:
    """Read a configuration of HAProxy's that an agent wrote; `None` for one that is not the DHCP agent's.

    Source: `neutron/agent/metadata/driver_base.py`.
    """
    identity, pid_file = _IDENTITY.search(text), _PID_FILE.search(text)
    if _BIND.search(text) is None or identity is None or pid_file is None:
        return None
    scope = Scope.NETWORK if identity[1] == "Network" else Scope.ROUTER
    return DhcpProxy(NetworkId(identity[2]), scope, pid_file[1])


def router_network(name: str) -> Network | None:
    """The record of a router's namespace; `None` for others."""
    if (router := router_of(name)) is None:
        return None
    return Network(router, NamespaceListener(name, redirected=True), scope=Scope.ROUTER)


def router_of(name: str) -> NetworkId | None:
    """The router of a namespace of the L3 agent's; `None` for others."""
    found = name.removeprefix(ROUTER_PREFIX)
    return NetworkId(found) if found != name and _UUID.fullmatch(found) else None
