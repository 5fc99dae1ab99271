"""The ways from a guest to Nova, for everybody of the table: one daemon, and a namespace for each network and router.

A guest is no machine here. Its addresses are in the namespace that stands for its network (or for the router that
it is behind), as everybody else's of that network, and it asks from one of them: what imdsproxy goes by is the
peer address that the kernel reports.

The daemon runs in the machine's own namespace, where Nova and Neutron listen on loopback; whoever it listens to
is in namespaces of the lab.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, TypeAlias

from support.daemon import Daemon
from support.guest import IPV4, IPV6, Connection, Guest
from support.lab import Lab, RecordMapping, batch, until, within
from support.openstack.lab import OpenStack
from support.openstack.table import BLUE, NETWORKS, ROUTERS, Lookup
from support.patience import patience

Way: TypeAlias = Literal["listener", "agent-proxy", "ovn-proxy", "namespace-proxy"]
Source: TypeAlias = Literal["neutron", "records"]

WAYS: Final[tuple[Way, ...]] = ("listener", "agent-proxy", "ovn-proxy", "namespace-proxy")
"""imdsproxy's own listener in the namespace; or, behind the unix socket: a HAProxy with the configuration that
Neutron's DHCP and L3 agents write, one with that of OVN's agent, and `imdsproxy namespace-proxy`."""

RESPONSE_TIMEOUT_S: Final = 3.0
"""How long the daemon waits for Nova."""

_DEVICE: Final = "br0"
_L3_PORT: Final = 9697
_ROUTERS: Final = frozenset(one.name for one in ROUTERS)
_SCOPES: Final = (
    *(one.name for one in NETWORKS if not one.external),
    *(one.name for one in ROUTERS),
)
_NAMESPACE_PROXY: Final = str(Path(sys.executable).with_name("neutron-ns-metadata-proxy"))


def _own_loopback() -> str:
    # Whole tests run beside each other on one machine; nobody else has this address.
    return f"127.{secrets.randbelow(254) + 1}.{secrets.randbelow(255)}.{secrets.randbelow(254) + 1}:9465"


def goes(way: Way, scope: str) -> bool:
    """Whether there is such a way: OVN's agent has no proxies for routers."""
    return way != "ovn-proxy" or scope not in _ROUTERS


@dataclass(slots=True)
class Ways:
    """A daemon that knows everybody of the table, and the ways to it.

    Attributes:
        state: Neutron's state path.
        neutron: Of the settings `sources.neutron`, beside where it is.
        nova: Of the one endpoint set, beside where the lab's first Nova is, and its secret.
        metrics: Where the daemon tells its figures.
    """

    openstack: OpenStack
    lab: Lab
    daemon: Daemon
    state: Path
    source: Source
    neutron: Mapping[str, object]
    nova: Mapping[str, object]
    metrics: str = field(default_factory=_own_loopback)
    sites: dict[tuple[Way, str], str] = field(default_factory=dict)

    def guest(self, way: Way, scope: str, address: str = "") -> Guest:
        """Whoever has an address in a network or behind a router."""
        return Guest(
            f"{address} in {scope} by {way}",
            self.sites[way, scope],
            self.ids[scope],
            "",
            (),
            _DEVICE,
            port=_L3_PORT if _at_l3_port(way, scope) else 80,
            source=address or None,
        )

    def connect(self, way: Way, scope: str, address: str) -> Connection:
        """A connection to the metadata address of the guest's family.

        Raises:
            Lost: Nobody takes it.
        """
        to = IPV6 if ":" in address else IPV4
        return self.guest(way, scope, address).connect(to=to)

    @property
    def ids(self) -> Mapping[str, str]:
        """Every network's and router's id, by its name."""
        return {**self.openstack.seed.networks, **self.openstack.seed.routers}

    @property
    def socket(self) -> Path:
        """Where the agents' HAProxies connect."""
        return self.state / "metadata_proxy"

    def settings(
        self, *, nova: Mapping[str, object] | None = None
    ) -> Mapping[str, Mapping[str, object]]:
        """The daemon's settings.

        Args:
            nova: More of the one endpoint set, as another secret or other endpoints.
        """
        chosen = {
            "endpoints": [{"url": self.openstack.nova_url}],
            "secret_file": str(self.openstack.secret_file),
            **self.nova,
            **(nova or {}),
        }
        sources: dict[str, object] = {}
        if self.source == "neutron":
            asked = {"enabled": True, "endpoint": self.openstack.neutron_url}
            sources["neutron"] = {**asked, **self.neutron}
        return {
            "sources": sources,
            "nova": {
                "response_timeout_s": RESPONSE_TIMEOUT_S,
                "health_check_interval_s": 0.2,
                "endpoint_sets": {"default": chosen},
            },
            "unix_listener": {"enabled": True, "path": str(self.socket)},
            # Nobody here is announced late; half of the table's rows would wait in vain.
            "resolver": {"hold_s": 0.0},
            "haproxy": {"hard_stop_after_s": 1},
            "metrics": {"listen": self.metrics},
        }

    def networks(self) -> list[RecordMapping]:
        """Records of the networks and routers that the daemon itself listens in."""
        return [
            {
                "id": self.ids[scope],
                "name": scope,
                "listener": {"namespace": self.sites["listener", scope], "device": _DEVICE},
                "scope": "router" if scope in _ROUTERS else "network",
                # Its guests' addresses are the namespace's own: no frame of theirs has a MAC.
                "mac_check": False,
            }
            for scope in _SCOPES
        ]

    def instances(self) -> list[RecordMapping]:
        """Records of all that Neutron's ports say, as the source `records` has them.

        Who is behind a router has a port there too, since records say of each listener whom it serves.
        """
        ports: dict[str, list[RecordMapping]] = {}
        for port in self.openstack.seed.ports:
            plan = port.plan
            if plan.device_owner != "compute:nova":
                continue
            behind = (one.name for one in ROUTERS if plan.network in one.networks)
            for scope in (plan.network, *behind):
                told: RecordMapping = {
                    "network": self.ids[scope],
                    "mac": plan.mac,
                    "addresses": list(plan.addresses),
                    "project": plan.project_id,
                }
                ports.setdefault(port.device_id, []).append(told)
        projects = {one.uuid: one.project_id for one in self.openstack.instances.values()}
        return [
            {
                "id": uuid,
                "name": uuid,
                "upstream": "nova",
                "project": projects.get(uuid, BLUE),
                "ports": told,
            }
            for uuid, told in ports.items()
        ]

    def start(self) -> None:
        """Start the daemon and tell it of its networks."""
        self.daemon.configure(self.settings())
        self.daemon.start()
        self.daemon.put(self.networks(), self.instances() if self.source == "records" else ())
        until(lambda: self.daemon.status()["serving"] == len(_SCOPES), what="all networks' service")

    def take_over(self, settings: Mapping[str, Mapping[str, object]]) -> None:
        """Change the daemon's settings while it runs."""
        self.daemon.reconfigure(settings)

    def furnish(self, way: Way, scope: str, more: Sequence[str] = ()) -> None:
        """Make a namespace with all of its guests' addresses.

        Args:
            more: Addresses beside those of the table.
        """
        namespace = self.lab.namespace(f"{WAYS.index(way)}-{scope}")
        self.sites[way, scope] = namespace
        batch(
            namespace,
            [
                f"link add {_DEVICE} type bridge",
                f"link set {_DEVICE} up",
                f"address add {IPV4}/32 dev {_DEVICE}",
                f"address add {IPV6}/64 dev {_DEVICE} nodad",
                *(_address(one) for one in {*_addresses(self.openstack.lookups, scope), *more}),
            ],
        )

    def start_proxies(self) -> None:
        """Start the proxies of all namespaces, as the agents do whose they are."""
        commands = [
            (
                self.sites[way, scope],
                self._namespace_proxy(scope)
                if way == "namespace-proxy"
                else self._agents_haproxy(way, scope),
            )
            for way, scope in self.sites
            if way != "listener"
        ]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda one: _run(*one), commands))

    def _agents_haproxy(self, way: Way, scope: str) -> list[str]:
        file = self.state / f"{way}-{scope}.conf"
        of_router = scope in _ROUTERS
        kind: Literal["network", "router", "ovn"] = (
            "router" if of_router else "ovn" if way == "ovn-proxy" else "network"
        )
        text = self.openstack.front.config(
            kind,
            self.ids[scope],
            socket=self.socket,
            bind_address="::" if of_router else IPV4,
            port=_L3_PORT if of_router else 80,
            bind_address_v6=None if of_router else IPV6,
            bind_interface=None if of_router else _DEVICE,
            state_path=self.state,
            pid_file=self.state / f"{way}-{scope}.pid",
        )
        file.write_text(text)
        return ["/usr/bin/env", "haproxy", "-f", str(file)]

    def _namespace_proxy(self, scope: str) -> list[str]:
        kind = "router" if scope in _ROUTERS else "network"
        port = _L3_PORT if _at_l3_port("namespace-proxy", scope) else 80
        return [
            _NAMESPACE_PROXY,
            f"--{kind}_id={self.ids[scope]}",
            f"--state_path={self.state}",
            f"--metadata_port={port}",
            f"--pid_file={self.state / self.ids[scope]}.pid",
        ]


def _run(namespace: str, words: Sequence[str]) -> None:
    done = subprocess.run(
        [*within(namespace), *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=60 * patience(),
    )
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"


def _at_l3_port(way: Way, scope: str) -> bool:
    # The L3 agent's rules lead there; the other agents' proxies have port 80 itself.
    return way != "listener" and scope in _ROUTERS


def _addresses(lookups: Sequence[Lookup], scope: str) -> Iterator[str]:
    return (row.address for row in lookups if row.scope == scope)


def _address(address: str) -> str:
    if ":" not in address:
        return f"address add {address}/32 dev {_DEVICE}"
    return f"address add {address}/{64 if address.startswith('fe80:') else 128} dev {_DEVICE} nodad"


@contextlib.contextmanager
def open_ways(
    openstack: OpenStack,
    *,
    source: Source = "neutron",
    ways: Sequence[Way] = WAYS,
    neutron: Mapping[str, object] | None = None,
    nova: Mapping[str, object] | None = None,
    more: Mapping[str, Sequence[str]] | None = None,
) -> Iterator[Ways]:
    """The ways, all of them gone without a trace at the end.

    Args:
        source: Where the daemon knows the guests from.
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
        opened = Ways(openstack, lab, daemon, state, source, neutron or {}, nova or {})
        for way in WAYS:
            if way == "listener" or way in ways:
                for scope in (one for one in _SCOPES if goes(way, one)):
                    opened.furnish(way, scope, (more or {}).get(scope, ()))
        opened.start()
        # They end with their namespaces.
        opened.start_proxies()
        yield opened
