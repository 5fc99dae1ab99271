"""Controllers that do not run: real parts over a directory, whose state a test sets."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final

from imdsproxy.api.metrics import Metrics
from imdsproxy.config.changes import SettingsHolder
from imdsproxy.config.load import Loaded
from imdsproxy.config.schema import Settings
from imdsproxy.controller import build
from imdsproxy.controller.parts import Parts, build_parts
from imdsproxy.controller.traffic import count_traffic
from imdsproxy.errors import Problem, SourceUnavailable
from imdsproxy.haproxy.launch import HaproxyProgram
from imdsproxy.haproxy.layout import Layout
from imdsproxy.haproxy.process import ReloadReport
from imdsproxy.haproxy.rules.model import UnixBind
from imdsproxy.haproxy.rules.runtime import Processes
from imdsproxy.host.clock import Clock
from imdsproxy.host.notify import ServiceNotifier
from imdsproxy.host.process import read_stat
from imdsproxy.host.state import Effect, Family, ListeningSocket
from imdsproxy.model.entities import (
    METADATA_IPV4,
    Instance,
    InstanceId,
    MacAddress,
    NamespaceListener,
    Network,
    NetworkId,
    Port,
)
from imdsproxy.model.identity import Denial, Learned
from imdsproxy.model.observation import Observation
from imdsproxy.network.anti_spoofing.kernel import Claims
from imdsproxy.network.anti_spoofing.plan import MacFilter, MacFilterPlan
from imdsproxy.network.listeners.plan import ListenerPlan
from imdsproxy.network.planned import Endpoint, Foreign, NotServed, NotServedCode
from imdsproxy.nova.upstream import NovaEndpointReport, NovaUpstream
from imdsproxy.reconcile.progress import Progress
from imdsproxy.sources.fleet.known import Position

NOW: Final = 1_760_093_784
RED: Final = NetworkId("red")
BUSY: Final = NotServed(RED, None, NotServedCode.PORT_BUSY, "nginx has port 80", "stop it")
BROKEN: Final = Problem("x", "is broken")
_MAC: Final = MacAddress("52:54:00:00:00:01")


class StillClock(Clock):
    """A wall clock that stands still at `NOW`."""

    def now(self) -> datetime:
        return datetime.fromtimestamp(NOW, UTC)


class _StoppedClock(StillClock):
    def monotonic(self) -> float:
        return 93_789.0


@contextmanager
def make_controller(directory: Path, clock: Clock, **sections: Any) -> Iterator[Parts]:
    """The parts of a controller with these sections of the settings."""
    paths = {"state_dir": directory / "state", "runtime_dir": directory / "run"}
    for path in paths.values():
        path.mkdir(exist_ok=True)
    settings = Settings.model_validate({"paths": paths, **sections})
    layout = Layout.of(settings)
    layout.records.mkdir(exist_ok=True)
    loaded = Loaded(settings)
    thread = build.build_thread(settings)
    nova = NovaUpstream(layout.runtime)
    nova.read(settings.nova)
    try:
        yield build_parts(
            holder=SettingsHolder(loaded, lambda: loaded),
            clock=clock,
            notifier=ServiceNotifier(""),
            nova=nova,
            thread=thread,
            program=HaproxyProgram("/usr/sbin/haproxy", "3.0.11", frozenset()),
            config=None,
            environment={},
            progress=Progress(),
        )
    finally:
        thread.close()


@contextmanager
def idle_controller(directory: Path, **sections: Any) -> Iterator[Parts]:
    """A controller without problems, and with no more than every controller has."""
    settings = {"limits": {"enabled": False}, **sections}
    with make_controller(directory, _StoppedClock(), **settings) as controller:
        controller.haproxy.processes = Processes(100, 102, (101,), 8)
        controller.probe.problem = None
        controller.records.observe(Observation("sqlite", full=True))
        controller.counting.recalled = True
        yield controller


@contextmanager
def busy_controller(directory: Path, **sections: Any) -> Iterator[Parts]:
    """A controller in front of Neutron and Nova, of a fleet, of which everything is in use."""
    secret = directory / "secret"
    secret.write_text("a secret of Nova's\n")
    secret.chmod(0o600)
    nova = {"endpoints": [{"url": "http://192.0.2.1:8775"}], "secret_file": secret}
    usual = {
        "sources": {
            "neutron": {"enabled": True, "endpoint": "http://192.0.2.3:9696"},
            "fleet": {"enabled": True, "hubs": ["https://hub1:7443"]},
        },
        "nova": {"endpoint_sets": {"default": nova}},
        "unix_listener": {"enabled": True, "path": "/run/agent"},
        "audit": {"mode": "all", "destination": "/x"},
        "policy": {"networks": {"bleu": {"tokens": "required"}}},
    }
    with idle_controller(directory, **{**usual, **sections}) as controller:
        _use(controller)
        yield controller


def _use(one: Parts) -> None:
    _report_records(one)
    _listen(one)
    one.records.rounds.add(0.125)
    one.records.progress.note("storing instances", 1, 2)
    one.resolver.outcomes.update({"found": 1, Denial.UNKNOWN: 2})
    one.resolver.mismatched[RED] = 3
    one.resolver.durations.add(0.005)
    one.counting.ledger.read.update(blue=8, red=1)
    one.counting.ledger.refused.update(blue=2)
    one.audit.written, one.audit.lost = 40, 4
    one.audit._failure = Problem("audit.destination", "/x: disk full")
    one.nova_watch.endpoints = (
        NovaEndpointReport("default", "192.0.2.1:8775", up=True, failures=4),
        NovaEndpointReport("default", "192.0.2.2:8775", up=False),
    )
    one.nova_watch.refused.add(102, {"default": 6})
    one.haproxy.last_reload = ReloadReport(8, 6.0, "networks changed", False, "no file", 0.5)
    one.haproxy.reload_counts.update(ok=7, failed=1)
    one.haproxy.reload_durations.add(0.05)
    one.watchdog.restarts = 1
    one.traffic.limited = 2
    agents = {**row("agents", 3, 2, 1), "pxname": "agents"}
    one.traffic.totals.add(1, count_traffic([row("blue", 100, 3, 1), row("red", 10), agents]))
    _follow(one)


def _report_records(one: Parts) -> None:
    networks = {
        NetworkId(name): Network(NetworkId(name), NamespaceListener(name))
        for name in ("blue", "red")
    }
    addresses = {"a": ("10.0.0.1", "10.0.0.2"), "b": ("10.0.0.3",), "c": ("10.0.0.4",)}
    instances = {}
    for name, some in addresses.items():
        port = Port(NetworkId("blue"), addresses=tuple(map(ip_address, some)))
        instances[InstanceId(name)] = Instance(InstanceId(name), name, name, ports=(port,))
    refused = (Problem("name", "is empty"),)
    for observation in (
        Observation("sqlite", True, networks, instances, problems=refused),
        Observation("neutron", full=True),
        Observation("fleet", full=True),
    ):
        one.records.observe(observation)
    at = NetworkId("blue"), METADATA_IPV4
    one.records.learned[at] = Learned(InstanceId("a"), 0.0, mac=_MAC)
    one.records.learned[RED, METADATA_IPV4] = Learned(InstanceId("a"), 0.0)
    filters = {NetworkId(name): MacFilter(NetworkId(name), None, (), name) for name in "abc"}
    one.mac_filters.plan = MacFilterPlan(filters=filters)
    one.mac_filters.refused = {NetworkId(name): BROKEN for name in "abcd"}
    one.mac_filters.preload({at: _MAC, (RED, METADATA_IPV4): _MAC})
    one.forged_claims._read_at = one.clock.monotonic()
    one.forged_claims.by_network = {
        RED: Claims(7, {METADATA_IPV4: (MacAddress("52:54:00:00:00:09"),)})
    }


def _listen(one: Parts) -> None:
    listeners, unix = one.listeners, one.listeners.unix
    places = [NetworkId(name) for name in ("blue", "red")]
    sockets = [ListeningSocket(METADATA_IPV4, port, None, port) for port in (1, 2, 2)]
    listeners.last_plan = ListenerPlan(
        endpoints=tuple(Endpoint(name, METADATA_IPV4, 80, None, None) for name in places),
        not_served=(BUSY, BUSY),
        foreign=tuple(Foreign(RED, Family.IPV4, Effect.BLOCKS, socket) for socket in sockets),
        problems=(Problem("red", "no device"),),
        operations=3,
        at=7.0,
        seconds=0.002,
        reasons=("networks changed",),
    )
    listeners.durations.add(0.025)
    one.host.operations["ok"] = 20
    unix.bind, unix.serving = UnixBind("/run/agent", "0644", 1, 2), True
    unix.taken_over, unix.taken_from = 2, "agent (pid 7)"
    own = read_stat(os.getpid())
    assert own is not None
    # The three processes of the document server are this one.
    one.companion.pid_file.write_text(f"{os.getpid()} {own.started}\n" * 3)


def _follow(one: Parts) -> None:
    neutron, fleet = one.sources.look_up, one.sources.fleet
    assert neutron is not None
    assert fleet is not None
    queries = neutron.queries
    queries.results.update(ok=9, failed=2, timeout=1)
    queries.durations.add(0.25)
    queries.outage = SourceUnavailable("no answer")
    queries.answered, queries.until = 93_776.5, 93_789.75
    neutron.look_ups.update({"found": 5, "negative-cached": 3})
    known: Any = dict.fromkeys(range(7))
    neutron.known.ports = known
    fleet.hub, fleet.acknowledged, fleet.skew_s = "https://hub1:7443", 812, 0.25
    fleet._vouched = fleet.clock.moment().before(2.5)
    fleet.serve_s, fleet.known.position = 3600.0, Position("a fleet")
    fleet.known.items = {"instance/a": 7, "instance/b": 8}
    fleet.known.held = {"instance/b": "etcd no longer has the item"}
    fleet.failing = {"instance/a": "the disk is full"}
    fleet.certificate_end = 1_800_000_000.0


def row(network: str, requests: int, denied: int = 0, errors: int = 0) -> dict[str, str]:
    """A line of `show stat`."""
    counts = {"stot": str(requests), "dreq": str(denied), "ereq": str(errors)}
    return {"pxname": "guests", "svname": network, "type": "3", **counts}


def expose(controller: Parts) -> str:
    """Its metrics, as Prometheus reads them."""
    return Metrics(controller).expose("")[1].decode()
