"""The ways from a guest to Nova, for everybody of the table: one daemon, and a namespace for each network and router.

A guest is no machine here. Its addresses are in the namespace that stands for its network (or for the router that
it is behind), as everybody else's of that network, and it asks from one of them: what imdsproxy goes by is the
peer address that the kernel reports.

The daemon runs in the machine's own namespace, where Nova and Neutron listen on loopback; whoever it listens to
is in namespaces of the lab.
"""

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

from support.daemon import Daemon
from support.guest import IPV4, IPV6, Connection, Guest
from support.lab import Lab, RecordMapping, batch, run, until, within
from support.openstack.front import L3_PORT, Front, FrontKind, start_fronts
from support.openstack.lab import OpenStack
from support.openstack.table import NETWORKS, ROUTERS

Way: TypeAlias = Literal["listener", "agent-proxy", "ovn-proxy", "namespace-proxy"]

WAYS: Final[tuple[Way, ...]] = ("listener", "agent-proxy", "ovn-proxy", "namespace-proxy")
"""imdsproxy's own listener in the namespace; or, behind the unix socket: a HAProxy with the configuration that
Neutron's DHCP and L3 agents write, one with that of OVN's agent, and `imdsproxy namespace-proxy`."""

_DEVICE: Final = "br0"
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
    """

    openstack: OpenStack
    lab: Lab
    daemon: Daemon
    state: Path
    neutron: Mapping[str, object]

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
            nova: More of the one endpoint set, as another secret.
        """
        chosen = {
            "endpoints": [{"url": self.openstack.nova_url}],
            "secret_file": str(self.openstack.secret_file),
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

    def start_proxies(self, ways: Sequence[Way]) -> None:
        """Start the proxies of all namespaces, as the agents do whose they are; they end with the namespaces."""
        places = [(way, scope) for way in ways for scope in _SCOPES if goes(way, scope)]
        fronts = [
            Front(_kind(way, scope), self.ids[scope], self._namespace(way, scope), _DEVICE)
            for way, scope in places
            if way in {"agent-proxy", "ovn-proxy"}
        ]
        start_fronts(fronts, socket=self.state / "metadata_proxy", state=self.state)
        for way, scope in places:
            if way == "namespace-proxy":
                run(
                    *(*within(self._namespace(way, scope)), _NAMESPACE_PROXY),
                    f"--{_kind(way, scope)}_id={self.ids[scope]}",
                    f"--state_path={self.state}",
                    f"--metadata_port={_port(way, scope)}",
                    f"--pid_file={self.state / scope}.pid",
                )


def _kind(way: Way, scope: str) -> FrontKind:
    return "router" if scope in _ROUTERS else "ovn" if way == "ovn-proxy" else "network"


def _port(way: Way, scope: str) -> int:
    return L3_PORT if way != "listener" and scope in _ROUTERS else 80


def _interface(address: str) -> str:
    if ":" not in address:
        return f"{address}/32 dev {_DEVICE}"
    return f"{address}/{64 if address.startswith('fe80:') else 128} dev {_DEVICE} nodad"


@contextlib.contextmanager
def open_ways(
    openstack: OpenStack,
    *,
    ways: Sequence[Way] = WAYS[1:],
    neutron: Mapping[str, object] | None = None,
    more: Mapping[str, Sequence[str]] | None = None,
) -> Iterator[Ways]:
    """The ways, all of them gone without a trace at the end.

    Args:
        ways: Those that are needed beside `listener`.
        neutron: See `Ways`.
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
        opened = Ways(openstack, lab, daemon, state, neutron or {})
        for way in ("listener", *ways):
            for scope in _SCOPES:
                if goes(way, scope):
                    opened.furnish(way, scope, (more or {}).get(scope, ()))
        daemon.configure(opened.settings())
        daemon.start()
        daemon.put(opened.networks())
        until(lambda: daemon.status()["serving"] == len(_SCOPES), what="all networks' service")
        opened.start_proxies(ways)
        yield opened
