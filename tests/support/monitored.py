"""A host with everything switched on that metrics speak of, and a real Prometheus that scrapes it.

A second daemon beside it has a wrong clock and a Neutron that does not answer.
"""

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from support.daemon import Daemon, instance
from support.guest import Guest
from support.identity.requests import identity_settings
from support.lab import RecordMapping, run, until
from support.nova_world import SECRET, nova_instance
from support.prometheus import Prometheus, open_prometheus
from support.recorder import Recorder
from support.world import World, open_world

CONTROLLER: Final = "127.0.0.1:9465"
HAPROXY: Final = "127.0.0.1:9466"
_WRONG: Final = "127.0.0.1:9475"
_FAST: Final = """
import datetime
from imdsproxy.host.clock import Clock
right = Clock.now
Clock.now = lambda self: right(self) + datetime.timedelta(minutes=5)
"""
_CLOUDS: Final = {
    "clouds": {"here": {"auth_type": "none", "endpoint": "http://127.0.0.1:1/", "region_name": "r"}}
}


@dataclass(slots=True)
class Monitored:
    """The host.

    Attributes:
        world: Four networks, each with a guest of the same addresses, and their daemon.
        novas: Where the guest `vm` of network `green` gets its documents.
        stranger: A guest of the daemon whose clock is wrong; no source has it.
    """

    world: World
    wrong: Daemon
    novas: tuple[Recorder, Recorder]
    stranger: Guest
    prometheus: Prometheus

    @property
    def daemon(self) -> Daemon:
        return self.world.daemon

    @property
    def records(self) -> Path:
        """Where record files are read."""
        return self.daemon.directory / "records"

    @property
    def haproxy(self) -> Path:
        """The program that the settings name: a link to the real one."""
        return self.daemon.directory / "haproxy"

    @property
    def agent_socket(self) -> Path:
        return self.daemon.directory / "agents" / "proxy"

    def settings(self, **changed: Mapping[str, object]) -> Mapping[str, Mapping[str, object]]:
        """The daemon's settings with sections that are otherwise."""
        return {**self.world.settings, **changed}


def _nova(novas: Sequence[Recorder]) -> Mapping[str, object]:
    endpoints = [{"url": one.url} for one in novas]
    chosen = {"endpoints": endpoints, "secret_file": "{directory}/secret"}
    times = {"health_check": "tcp", "health_check_interval_s": 0.2, "response_timeout_s": 1.0}
    return {**times, "endpoint_sets": {"default": chosen}}


def _settings(
    novas: Sequence[Recorder], identity: Mapping[str, object]
) -> Mapping[str, Mapping[str, object]]:
    return {
        "identity": identity,
        "policy": {"host": {"audiences": ["vault"]}},
        "metrics": {"listen": CONTROLLER, "haproxy_listen": HAPROXY},
        "haproxy": {"binary": "{directory}/haproxy", "maxconn": 150, "hard_stop_after_s": 60},
        "resolver": {"hold_s": 3.0, "max_held_per_network": 4},
        "tokens": {"count_reads": "all"},
        "sources": {"file": {"enabled": True, "directory": "{directory}/records"}},
        "audit": {"mode": "all", "destination": "{directory}/log/audit.log"},
        "unix_listener": {
            "enabled": True, "path": "{directory}/agents/proxy", "take_over": True, "mode": "all",
        },
        "nova": _nova(novas),
    }  # fmt: skip


def _prepare(daemon: Daemon) -> None:
    for name in ("records", "log", "agents", "state"):
        (daemon.directory / name).mkdir(exist_ok=True)
    run("/usr/bin/mount", "-t", "tmpfs", "-o", "size=16m,mode=0755", "tmpfs", str(daemon.state))
    (daemon.directory / "haproxy").symlink_to("/usr/sbin/haproxy")
    daemon.write_secret("secret", SECRET)


@contextlib.contextmanager
def _wrong_daemon(world: World, nova: Recorder) -> Iterator[tuple[Daemon, Guest]]:
    lab = world.lab
    settings: dict[str, Mapping[str, object]] = {
        # Two daemons of one prefix would take each other's tables away.
        "host": {"name_prefix": f"x{lab.prefix[1:]}"},
        "metrics": {"listen": _WRONG, "haproxy_listen": None},
        "resolver": {"hold_s": 0.2},
        "sources": {
            "neutron": {
                "enabled": True, "cloud": "here", "clouds_file": "{directory}/clouds.yaml",
                "timeout_s": 0.5,
            },
            "libvirt": {"enabled": True, "uri": "qemu+unix:///system?socket=/nowhere/libvirt"},
        },
        "nova": _nova([nova]),
    }  # fmt: skip
    program = (sys.executable, "-m", "imdsproxy")
    place = world.daemon.directory / "site"
    place.mkdir()
    (place / "sitecustomize.py").write_text(_FAST)
    daemon = Daemon(lab, settings, program=program, environment={"PYTHONPATH": str(place)})
    try:
        daemon.write_secret("secret", SECRET)
        (daemon.directory / "clouds.yaml").write_text(json.dumps(_CLOUDS))
        network = lab.namespace_network("wrong")
        stranger = lab.guest("wrong")
        daemon.start(ready=False)
        daemon.put([network])
        yield daemon, stranger
    finally:
        daemon.close()


def _green(nova: RecordMapping) -> RecordMapping:
    """Nova's guest beside the embedded one, at another address."""
    return {**nova, "ports": instance("vm", "green", 6)["ports"]}


@contextlib.contextmanager
def open_monitored() -> Iterator[Monitored]:
    """The host; all of it is gone at the end."""
    with contextlib.ExitStack() as stack:
        novas: list[Recorder] = []

        def prepare(daemon: Daemon) -> None:
            _prepare(daemon)
            lab = daemon.lab
            novas.extend(
                stack.enter_context(Recorder(namespace=lab.host, secret=SECRET)) for _ in range(2)
            )
            place = daemon.directory / "issuer"
            place.mkdir()
            daemon.configure(_settings(novas, identity_settings(place)[0]))

        world = stack.enter_context(open_world(prepare=prepare))
        guest = world.lab.guest("green", 6)
        world.guests["nova"] = guest
        world.daemon.put(instances=[_green(nova_instance("green", "vm"))])
        wrong, stranger = stack.enter_context(_wrong_daemon(world, novas[0]))
        jobs = {"imdsproxy": [CONTROLLER, _WRONG], "imdsproxy-haproxy": [HAPROXY]}
        place = world.daemon.directory
        prometheus = stack.enter_context(open_prometheus(world.lab.host, place, jobs))
        until(lambda: len(prometheus.query("up == 1")) == 3, what="three targets that are scraped")
        yield Monitored(world, wrong, (novas[0], novas[1]), stranger, prometheus)
