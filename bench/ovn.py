"""A host of an OVN cloud, with metadata served by imdsproxy alone, or by Neutron's own OVN agent.

Both use the same databases (`bench.southbound`), stand-in for Nova and guests. Guests and metadata port of a network
are on a bridge, so that neither Open vSwitch nor OVN is measured. The agent is Neutron's from PyPI, in the version
pinned for tests, and unmodified.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.bare import run_bare
from bench.context import Bench
from bench.daemon import Daemon
from bench.guest import Guest
from bench.lab import OVN_IDS, PREFIX
from bench.nova import PATH, nova_settings, render_stub
from bench.place import BenchError
from bench.procs import end_all, find_by_argument, wait_until
from bench.southbound import (
    HOST,
    OvnCloud,
    OvsdbServer,
    SbNetwork,
    SbPort,
    Southbound,
    add_chassis_to_vswitch,
    plan_cloud,
)
from support.openstack.install import environments

__all__ = [
    "OvnHost",
    "first_answers",
    "names",
    "open_host",
    "place_of",
    "run_agent",
    "run_ours",
]

_PER_NETWORK: Final = 4
"""Ports of this host in each network."""

_UNUSED: Final = 200
_HOST: Final = f"{PREFIX}ovn-host"
_ON_HOST: Final = (
    *("/usr/bin/nsenter", f"--net=/run/netns/{_HOST}", "--"),
    # Both remove unneeded `ovnmeta-` namespaces, so each may see only its own.
    *("/usr/bin/unshare", "--mount", "--propagation", "private", "/bin/sh", "-ec"),
    *('mount -t tmpfs none /run/netns; exec "$@"', "sh"),
)
"""Words before a command that runs on the host."""

_ROUTE: Final = "route add 169.254.169.254/32 via 10.0.0.2"
_NOVA_PORT: Final = 8775
_SLOW_PORT: Final = 8776
_OK: Final = 200
_AT_ONCE: Final = 50
_ACKNOWLEDGE_S: Final = 0.005
_END_S: Final = 30.0


@dataclass(slots=True)
class OvnHost:
    """The databases, filled.

    Attributes:
        cloud: Ports of the cloud.
        rows: Writer of the Southbound database.
    """

    bench: Bench
    directory: Path
    cloud: OvnCloud
    vswitch: OvsdbServer
    sb: OvsdbServer
    rows: Southbound
    nova: Mapping[str, Mapping[str, object]]

    @property
    def networks(self) -> Sequence[SbNetwork]:
        """Networks that have ports on this host."""
        return sorted({port.network for port in self.cloud.local}, key=lambda one: one.number)

    @property
    def spare(self) -> SbPort:
        """A port without a row, whose guest exists."""
        return SbPort(self.networks[0], _UNUSED)

    def guest(self, port: SbPort, *, timeout_s: float = 1) -> Guest:
        """Return a port's guest."""
        return Guest(self.bench.lab, place_of(port), port.address, timeout_s=timeout_s)

    def join(self, network: SbNetwork) -> bool:
        """Connect a network's guests with its metadata port; return whether the port exists."""
        return self.bench.lab.join(_HOST, _bridge(network), network.devices[0])

    def clear(self) -> None:
        """Wait until the networks' namespaces and their metadata ports are gone."""
        lab = self.bench.lab
        devices = [network.devices[0] for network in self.networks]
        # The devices vanish with the last process of their namespace.
        wait_until(lambda: not any(lab.has(_HOST, one) for one in devices), _END_S)


def place_of(port: SbPort) -> str:
    """Return the namespace of a port's guest."""
    return f"{_HOST}-{port.network.number}-{port.number}"


def _bridge(network: SbNetwork) -> str:
    return f"br{network.number}"


@contextlib.contextmanager
def _in_vswitchds_place(server: OvsdbServer) -> Iterator[None]:
    """Acknowledge each change of Open vSwitch's database, as ovs-vswitchd does: the agent waits for that."""
    ended = threading.Event()
    select = {
        "op": "select",
        "table": "Open_vSwitch",
        "where": [],
        "columns": ["next_cfg", "cur_cfg"],
    }

    def acknowledge() -> None:
        with contextlib.closing(server.client()) as client:
            while not ended.wait(_ACKNOWLEDGE_S):
                (found,) = client.transact("Open_vSwitch", select)[0]["rows"]
                if found["next_cfg"] != found["cur_cfg"]:
                    row = {"cur_cfg": found["next_cfg"]}
                    change = {"op": "update", "table": "Open_vSwitch", "where": [], "row": row}
                    client.transact("Open_vSwitch", change)

    thread = threading.Thread(target=acknowledge)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def names(port: SbPort, body: bytes, instance: str = "") -> bool:
    """Return whether a document names the port's instance, or another instance that has the port now."""
    return f'"uuid": "{instance or port.instance}"'.encode() in body


@contextlib.contextmanager
def open_host(bench: Bench, ports: int, local: int) -> Iterator[OvnHost]:
    """Open a host in a cloud of this many ports, with `local` ports on the host; remove everything at the end."""
    directory = bench.directory / "ovn"
    directory.mkdir(exist_ok=True)
    cloud = plan_cloud(OVN_IDS, ports, local=local, networks=-(-local // _PER_NETWORK))
    bench.lab.add_host(_HOST)
    vswitch = OvsdbServer(directory, "Open_vSwitch", "vswitch").create()
    sb = OvsdbServer(directory, "OVN_Southbound", "sb").create()
    stub = render_stub(_NOVA_PORT, _SLOW_PORT).replace(" backlog", f" namespace {_HOST} backlog")
    with contextlib.ExitStack() as stack:
        stack.callback(bench.lab.sweep)
        for server in (vswitch, sb):
            stack.callback(server.kill)
            server.start()
        rows = Southbound(stack.enter_context(contextlib.closing(sb.client())))
        rows.begin()
        rows.fill(cloud)
        with contextlib.closing(vswitch.client()) as client:
            add_chassis_to_vswitch(client, sb.remote)
        stack.enter_context(_in_vswitchds_place(vswitch))
        stack.enter_context(run_bare(bench.binary, bench.directory, "nova-ovn", stub))
        nova = nova_settings(directory, _NOVA_PORT)
        host = OvnHost(bench, directory, cloud, vswitch, sb, rows, nova)
        for network in host.networks:
            bench.lab.add_bridge(_HOST, _bridge(network))
        for port in (*cloud.local, host.spare):
            where = (_HOST, _bridge(port.network), place_of(port))
            lines = (f"address add {port.address}/16 dev eth0", _ROUTE)
            bench.lab.plug_at(*where, mac=port.mac, lines=lines)
        yield host


def first_answers(host: OvnHost, ports: Iterable[SbPort], patience_s: float) -> float:
    """Send requests from all these guests until each is answered as itself; return the seconds until the last answer.

    Raises:
        BenchError: Not in time.
    """
    began = time.perf_counter()
    left = list(ports)
    while left:
        if time.perf_counter() - began > patience_s:
            raise BenchError(f"{len(left)} guests are not answered after {patience_s:g} s")
        there = (port for port in left[:_AT_ONCE] if host.join(port.network))
        asked = [(port, host.guest(port)) for port in there]
        sent = [(port, guest) for port, guest in asked if guest.try_send(PATH)]
        good = set()
        for port, guest in sent:
            answer = guest.try_receive()
            if answer is not None and answer.status == _OK and names(port, answer.body):
                good.add(port)
        for _, guest in asked:
            guest.close()
        if not good:
            time.sleep(0.01)
        # Guests that wait go to the end, so that they do not delay others.
        left = [port for port in (*left[_AT_ONCE:], *left[:_AT_ONCE]) if port not in good]
    return time.perf_counter() - began


@contextlib.contextmanager
def run_ours(host: OvnHost) -> Iterator[Daemon]:
    """Run imdsproxy on the host, just started; remove everything that it made at the end."""
    source = {"enabled": True, "open_vswitch": host.vswitch.remote}
    sources = {"sqlite": {"enabled": False}, "ovn": source}
    directory = host.directory / "ours"
    daemon = Daemon(directory, {**host.nova, "sources": sources}, within=_ON_HOST)
    try:
        daemon.spawn()
        yield daemon
    finally:
        daemon.stop()
        host.clear()


def _settings_of_agent(host: OvnHost, directory: Path, helper: Path) -> str:
    secret = (host.directory / "nova.secret").read_text().strip()
    privsep = f"helper_command = {helper} --config-file {directory}/agent.conf"
    lines = [
        "[DEFAULT]",
        f"host = {HOST}",
        f"state_path = {directory}/state",
        f"metadata_proxy_socket = {directory}/metadata_proxy",
        f"metadata_proxy_shared_secret = {secret}",
        "nova_metadata_host = 127.0.0.1",
        f"nova_metadata_port = {_NOVA_PORT}",
        "[ovs]",
        f"ovsdb_connection = {host.vswitch.remote}",
        "[ovn]",
        f"ovn_sb_connection = {host.sb.remote}",
        # Everything runs as root already, so no command such as sudo is needed.
        "[agent]",
        "root_helper =",
    ]
    for section in ("privsep", "privsep_namespace", "privsep_link"):
        lines += [f"[{section}]", privsep]
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def run_agent(host: OvnHost) -> Iterator[Path]:
    """Run Neutron's agent on the host, just started; yield its directory, which all its processes name.

    Raises:
        BenchError: The agent cannot be installed.
    """
    directory = host.directory / "agent"
    (directory / "state").mkdir(parents=True, exist_ok=True)
    programs = environments().python("neutron").parent
    config = directory / "agent.conf"
    config.write_text(_settings_of_agent(host, directory, programs / "privsep-helper"))
    argv = [
        *_ON_HOST,
        *(str(programs / "neutron-ovn-metadata-agent"), "--config-file", str(config)),
    ]
    # An installed package is compiled, too.
    subprocess.run(
        [programs / "python", "-m", "compileall", "-q", programs.parent / "lib"], check=False
    )
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}:/usr/sbin:/sbin"}
    with (directory / "agent.log").open("ab") as log:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=environment,
        )
    try:
        yield directory
    finally:
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: process.poll() is not None, _END_S)
        end_all({process.pid, *find_by_argument(directory)})
        process.wait()
        host.clear()
