"""Networks and routers that belong to namespaces of Neutron's agents. Pure."""

import re
from dataclasses import dataclass
from typing import Final

from imdsproxy.model.entities import (
    METADATA_IPV4,
    METADATA_PORT,
    NamespaceListener,
    Network,
    NetworkId,
    Scope,
)

ROUTER_PREFIX: Final = "qrouter-"
"""Prefix of the L3 agent's router namespaces; its others (`snat-`, `fip-`) have no guests behind them."""

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
    """HAProxy that the DHCP agent has configured.

    The agent writes a configuration file if guests should get metadata in the network's own namespace. It removes the
    file if not: the network got a router, and the agent's settings do not force metadata.

    Attributes:
        id: Id of the network, or of the router if the network leads from a router to metadata.
        pid_file: File with the pid of the HAProxy, or of its replacement.
    """

    id: NetworkId
    scope: Scope
    pid_file: str

    @property
    def namespace(self) -> str | None:
        """Name of the proxy's namespace; `None` if only the process shows it."""
        return f"{DHCP_PREFIX}{self.id}" if self.scope is Scope.NETWORK else None

    def network_in(self, namespace: str) -> Network:
        return Network(self.id, NamespaceListener(namespace), scope=self.scope)


def parse_proxy(text: str) -> DhcpProxy | None:
    """Parse a HAProxy configuration written by an agent; `None` if it is not the DHCP agent's.

    Source: `neutron/agent/metadata/driver_base.py`.
    """
    identity, pid_file = _IDENTITY.search(text), _PID_FILE.search(text)
    if _BIND.search(text) is None or identity is None or pid_file is None:
        return None
    scope = Scope.NETWORK if identity[1] == "Network" else Scope.ROUTER
    return DhcpProxy(NetworkId(identity[2]), scope, pid_file[1])


def router_network(name: str) -> Network | None:
    if (router := router_of(name)) is None:
        return None
    return Network(router, NamespaceListener(name, redirected=True), scope=Scope.ROUTER)


def router_of(name: str) -> NetworkId | None:
    found = name.removeprefix(ROUTER_PREFIX)
    return NetworkId(found) if found != name and _UUID.fullmatch(found) else None
