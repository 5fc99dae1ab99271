"""A genuine OVN with guests, Nova, and a daemon that serves them."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from support.daemon import Daemon
from support.guest import IPV4, Guest, Reply
from support.lab import until
from support.nova_world import SECRET
from support.ovn_lab import OvnLab, open_ovn
from support.patience import patience
from support.recorder import Recorder, say_whose


@dataclass(slots=True)
class OvnWorld:
    """Nova answers with the instance that it is asked for, and refuses a signature that is not this instance's."""

    ovn: OvnLab
    daemon: Daemon
    nova: Recorder
    guests: dict[str, Guest] = field(default_factory=dict)

    def add(self, name: str, network: str, number: int = 11, *, mac: str = "") -> Guest:
        """Make a port and plug its guest in."""
        self.ovn.add_port(name, network, number, mac=mac)
        return self.plug(name)

    def plug(self, name: str, *, bridge: str = "") -> Guest:
        """Plug a port's guest in."""
        self.guests[name] = self.ovn.guest(name, bridge=bridge)
        return self.guests[name]

    def remove(self, *networks: str) -> None:
        """Have networks gone with their ports, and wait until nothing of them is left."""
        gone = [self.ovn.networks[name] for name in networks]
        if not networks:
            return
        self.ovn.remove_networks(*networks)
        self.guests = {name: one for name, one in self.guests.items() if name in self.ovn.ports}
        namespaces = {one.namespace for one in gone}
        devices = {one.devices[0] for one in gone}
        until(lambda: not namespaces & set(self.ovn.left_over()), what="the namespaces' end")
        until(lambda: not devices & set(self.ovn.plugged()), what="the ports' end")
        until(lambda: not devices & set(self.ovn.lab.host_links()), what="the devices' end")

    def asks_as(self, name: str, *, to: str = IPV4) -> str:
        """The instance that Nova is asked for when a guest asks; the status where it is not asked."""
        return self.guests[name].reads("/openstack", to=to, timeout_s=2 * patience())

    def wait_own(self, *names: str, to: str = IPV4, within_s: float = 3.0) -> None:
        """Wait until these guests are asked for as themselves."""
        for name in names or tuple(self.guests):
            until(
                partial(self._is, name, to),
                what=f"{name}, which is {self.asks_as(name, to=to)}, is itself",
                within_s=within_s,
            )

    def _is(self, name: str, to: str) -> bool:
        return self.asks_as(name, to=to) == self.ovn.ports[name].instance

    def owns(self, guest: Guest, answer: Reply) -> str | None:
        """What is wrong with an answer to a guest; `None` where it is its own."""
        name = next(name for name, one in self.guests.items() if one is guest)
        own = self.ovn.ports[name].instance
        if (answer.status, answer.text) == (200, own):
            return None
        return f"{name} got {answer.status} {answer.text[:80]}"

    def problems(self) -> Sequence[str]:
        """The places of the daemon's problems."""
        return [one["field"] for one in self.daemon.status()["problems"]]


def ovn_settings(
    open_vswitch: str, *, nova: str, secret: Path, **source: object
) -> Mapping[str, Mapping[str, object]]:
    """Of a daemon that knows its guests by OVN alone.

    Args:
        nova: Its URL.
        secret: The file with the secret that it shares.
        source: Further settings of the source.
    """
    endpoints = {"endpoints": [{"url": nova}], "secret_file": str(secret)}
    return {
        "sources": {
            "sqlite": {"enabled": False},
            "ovn": {"enabled": True, "open_vswitch": open_vswitch, **source},
        },
        "documents": {"supervisor": "spawn", "enabled": False},
        "nova": {"health_check": "tcp", "endpoint_sets": {"default": endpoints}},
    }


@contextlib.contextmanager
def open_ovn_world() -> Iterator[OvnWorld]:
    """A world whose daemon is configured, and not started yet."""
    with contextlib.ExitStack() as stack:
        ovn = stack.enter_context(open_ovn())
        nova = Recorder(namespace=ovn.lab.host, secret=SECRET, default=say_whose)
        stack.enter_context(nova)
        daemon = Daemon(ovn.lab)
        stack.callback(daemon.close)
        secret = daemon.write_secret("secret", SECRET)
        daemon.configure(ovn_settings(ovn.open_vswitch, nova=nova.url, secret=secret))
        yield OvnWorld(ovn, daemon, nova)
