"""The ways from a guest to Nova, for everybody of the table: one daemon, and a namespace for each network and router.

A guest is no machine here. Its addresses are in the namespace that stands for its network (or for the router that
it is behind), as everybody else's of that network, and it asks from one of them: what imdsproxy goes by is the
peer address that the kernel reports.

The daemon runs in the machine's own namespace, where Nova and Neutron listen on loopback; whoever it listens to
is in namespaces of the lab.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

from support.daemon import Daemon
from support.guest import IPV4, IPV6, Connection, Guest
from support.lab import Lab, RecordMapping, batch, run, until, within
from support.openstack.front import FrontKind
from support.openstack.lab import OpenStack
from support.openstack.table import NETWORKS, ROUTERS

Way: TypeAlias = Literal["listener", "agent-proxy", "ovn-proxy", "namespace-proxy"]

WAYS: Final[tuple[Way, ...]] = ("listener", "agent-proxy", "ovn-proxy", "namespace-proxy")
"""imdsproxy's own listener in the namespace; or, behind the unix socket: a HAProxy with the configuration that
Neutron's DHCP and L3 agents write, one with that of OVN's agent, and `imdsproxy namespace-proxy`."""

_DEVICE: Final = "br0"
_L3_PORT: Final = 9697
_ROUTERS: Final = frozenset(one.name for one in ROUTERS)
_SCOPES: Final = tuple(one.name for one in (*NETWORKS, *ROUTERS) if one.name != "net-ext")
_NAMESPACE_PROXY: Final = str(Path(sys.executable).with_name("neutron-ns-metadata-proxy"))


def goes(way: Way, scope: str) -> bool:
    """Whether there is such a way: OVN's agent has no proxies for routers."""
    return way != "ovn-proxy" or scope not in _ROUTERS


@dataclass(frozen=True, slots=True)
class Ways:
    """A daemon that knows everybody of the table, and the ways to it.

    Attributes:
        state: Neutron's state path.
        neutron: Of the settings `sources.neutron`, beside where it is.
        nova: Of the one endpoint set, beside where the lab's first Nova is, and its secret.
    """

    openstack: OpenStack
    lab: Lab
    daemon: Daemon
    state: Path
    neutron: Mapping[str, object]
    nova: Mapping[str, object]

    def guest(self, way: Way, scope: str, address: str) -> Guest:
        """Whoever has an address in a network or behind a router."""
        return Guest(
            f"{address} in {scope} by {way}",
            self._namespace(way, scope),
            self.ids[scope],
            "",
            (),
            _DEVICE,
            port=_port(way, scope),
            source=address,
        )

    def connect(self, way: Way, scope: str, address: str) -> Connection:
        """A connection to the metadata address of the guest's family.

        Raises:
            Lost: Nobody takes it.
        """
        return self.guest(way, scope, address).connect(to=IPV6 if ":" in address else IPV4)

    @property
    def ids(self) -> Mapping[str, str]:
        """Every network's and router's id, by its name."""
        return {**self.openstack.seed.networks, **self.openstack.seed.routers}

    def settings(self, **nova: object) -> Mapping[str, Mapping[str, object]]:
        """The daemon's settings.

        Args:
            nova: More of the one endpoint set, as another secret or other endpoints.
        """
        chosen = {
            "endpoints": [{"url": self.openstack.nova_url}],
            "secret_file": str(self.openstack.secret_file),
            **self.nova,
            **nova,
        }
        neutron = {"enabled": True, "endpoint": self.openstack.neutron_url, **self.neutron}
        return {
            "sources": {"neutron": neutron},
            "nova": {
                "response_timeout_s": 3.0,
                "health_check_interval_s": 0.2,
                "endpoint_sets": {"default": chosen},
            },
            "unix_listener": {"enabled": True, "path": str(self.state / "metadata_proxy")},
            # Nobody here is announced late; half of the table's rows would wait in vain.
            "resolver": {"hold_s": 0.0},
            "haproxy": {"hard_stop_after_s": 1},
        }

    def networks(self) -> list[RecordMapping]:
        """Records of the networks and routers that the daemon itself listens in."""
        return [
            {
                "id": self.ids[scope],
                "name": scope,
                "listener": {"namespace": self._namespace("listener", scope), "device": _DEVICE},
                "scope": "router" if scope in _ROUTERS else "network",
                # Its guests' addresses are the namespace's own: no frame of theirs has a MAC.
                "mac_check": False,
            }
            for scope in _SCOPES
        ]

    def _namespace(self, way: Way, scope: str) -> str:
        return self.lab.name(f"{WAYS.index(way)}-{scope}")

    def furnish(self, way: Way, scope: str, more: Sequence[str]) -> None:
        """Make a namespace with all of its guests' addresses.

        Args:
            more: Addresses beside those of the table.
        """
        namespace = self.lab.namespace(f"{WAYS.index(way)}-{scope}")
        own = {row.address for row in self.openstack.lookups if row.scope == scope}
        batch(
            namespace,
            [
                f"link add {_DEVICE} type bridge",
                f"link set {_DEVICE} up",
                *(f"address add {one}" for one in map(_interface, {*own, *more, IPV4, IPV6})),
            ],
        )

    def proxy(self, way: Way, scope: str) -> list[str]:
        """The command that starts a namespace's proxy as the agent does whose it is; it ends with the namespace."""
        of_router, port, ident = scope in _ROUTERS, _port(way, scope), self.ids[scope]
        pid_file = self.state / f"{way}-{scope}.pid"
        if way == "namespace-proxy":
            words = [
                _NAMESPACE_PROXY,
                f"--{'router' if of_router else 'network'}_id={ident}",
                f"--state_path={self.state}",
                f"--metadata_port={port}",
                f"--pid_file={pid_file}",
            ]
        else:
            kind: FrontKind = "router" if of_router else "ovn" if way == "ovn-proxy" else "network"
            own = {"bind_address": IPV4, "bind_address_v6": IPV6, "bind_interface": _DEVICE}
            text = self.openstack.front.config(
                kind,
                ident,
                socket=self.state / "metadata_proxy",
                port=port,
                state_path=self.state,
                pid_file=pid_file,
                **({"bind_address": "::"} if of_router else own),
            )
            file = pid_file.with_suffix(".conf")
            file.write_text(text)
            words = ["haproxy", "-f", str(file)]
        return [*within(self._namespace(way, scope)), *words]


def _port(way: Way, scope: str) -> int:
    # The L3 agent's rules lead there; the other agents' proxies have port 80 itself.
    return _L3_PORT if way != "listener" and scope in _ROUTERS else 80


def _interface(address: str) -> str:
    if ":" not in address:
        return f"{address}/32 dev {_DEVICE}"
    return f"{address}/{64 if address.startswith('fe80:') else 128} dev {_DEVICE} nodad"


@contextlib.contextmanager
def open_ways(
    openstack: OpenStack,
    *,
    ways: Sequence[Way] = WAYS,
    neutron: Mapping[str, object] | None = None,
    nova: Mapping[str, object] | None = None,
    more: Mapping[str, Sequence[str]] | None = None,
) -> Iterator[Ways]:
    """The ways, all of them gone without a trace at the end.

    Args:
        ways: Those that are needed; `listener` always is there.
        neutron, nova: See `Ways`.
        more: Addresses beside those of the table, by network or router.
    """
    with ExitStack() as stack:
        lab = Lab()
        stack.callback(lab.close)
        # Not pytest's: an account that HAProxy takes must reach the socket.
        state = Path(tempfile.mkdtemp(prefix="imdst-"))
        stack.callback(shutil.rmtree, state)
        state.chmod(0o755)
        daemon = Daemon(lab, in_lab=False)
        stack.callback(daemon.close)
        opened = Ways(openstack, lab, daemon, state, neutron or {}, nova or {})
        made = [
            (way, scope)
            for way in WAYS
            if way == "listener" or way in ways
            for scope in _SCOPES
            if goes(way, scope)
        ]
        for way, scope in made:
            opened.furnish(way, scope, (more or {}).get(scope, ()))
        daemon.configure(opened.settings())
        daemon.start()
        daemon.put(opened.networks())
        until(lambda: daemon.status()["serving"] == len(_SCOPES), what="all networks' service")
        proxies = [opened.proxy(*one) for one in made if one[0] != "listener"]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda words: run(*words), proxies))
        yield opened
