"""The HAProxies of Neutron's agents in front of the metadata agent's socket, as Neutron's own code configures them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from support.guest import IPV4, IPV6
from support.lab import run, within
from support.openstack.install import INSIDE, environments

FrontKind = Literal["network", "router", "ovn"]
"""As the DHCP agent, the L3 agent or OVN's metadata agent has it."""

L3_PORT = 9697
"""Where the L3 agent's rules lead; the other agents' proxies have port 80 itself."""


@dataclass(frozen=True, slots=True)
class Front:
    """One for a network or router, in a namespace.

    Attributes:
        device: Where guests ask, but for those behind a router; any for `None`.
        account: As whom and as which group it runs.
    """

    kind: FrontKind
    resource_id: str
    namespace: str
    device: str | None = "br0"
    account: tuple[str, str] = ("root", "root")


def front_configs(fronts: Sequence[Front], *, socket: Path, state: Path) -> list[str]:
    """The text of their configuration files, unmodified.

    Args:
        socket: Where the metadata agent is.
        state: Neutron's state path.
    """
    wanted = [
        {
            "kind": one.kind,
            "resource_id": one.resource_id,
            "unix_socket_path": str(socket),
            "host": "::" if one.kind == "router" else IPV4,
            "port": L3_PORT if one.kind == "router" else 80,
            "host_v6": None if one.kind == "router" or one.device is None else IPV6,
            "bind_interface": None if one.kind == "router" else one.device,
            "user": one.account[0],
            "group": one.account[1],
            "state_path": str(state),
            "pid_file": str(state / f"{one.namespace}.pid"),
        }
        for one in fronts
    ]
    python = str(environments().python("neutron"))
    texts: list[str] = json.loads(
        run(python, "-W", "ignore", str(INSIDE / "front_config.py"), stdin=json.dumps(wanted))
    )
    return texts


def start_fronts(fronts: Sequence[Front], *, socket: Path, state: Path) -> None:
    """Start them as the agents do; they go into the background, and end with their namespaces."""
    for one, text in zip(fronts, front_configs(fronts, socket=socket, state=state), strict=True):
        file = state / f"{one.namespace}.conf"
        file.write_text(text)
        run(*within(one.namespace), "haproxy", "-f", str(file))
