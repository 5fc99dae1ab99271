"""A lab whose instances' documents Nova has, and recorders in Nova's place."""

import contextlib
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from imdsproxy.haproxy.rules.model import NovaTimes
from imdsproxy.model.entities import InstanceId
from imdsproxy.model.wire import NovaRecord, render_map_value
from support.daemon import Daemon, instance
from support.forgeries import OTHER_INSTANCE, OTHER_PROJECT
from support.guest import IPV4, Connection, Guest
from support.haproxy_alone import open_alone
from support.lab import Lab, RecordMapping, until
from support.own_hosts import with_hosts
from support.patience import patience
from support.recorder import Answer, Received, Recorder, signature_of

INSTANCES: Final[Mapping[str, str]] = {
    "red": "aaaaaaaa-0000-4000-8000-00000000000a",
    "green": OTHER_INSTANCE,
}
PROJECTS: Final[Mapping[str, str]] = {
    "red": "11111111111111111111111111111111",
    "green": OTHER_PROJECT,
}
SECRET: Final = "the secret of now"
RESPONSE_TIMEOUT_S: Final = 1.0

_TIMES: Final[Mapping[str, object]] = {
    "response_timeout_s": RESPONSE_TIMEOUT_S,
    # Recorders count what guests ask.
    "health_check": "tcp",
    "health_check_interval_s": 0.2,
}


@dataclass(slots=True)
class NovaGuests:
    """Two networks with a guest each, both of the same addresses.

    Attributes:
        novas: Where requests go, in the order of the settings.
    """

    guests: Mapping[str, Guest]
    novas: Sequence[Recorder]

    @property
    def red(self) -> Guest:
        return self.guests["red"]

    @property
    def green(self) -> Guest:
        return self.guests["green"]

    @property
    def nova(self) -> Recorder:
        """The one that there is."""
        (one,) = self.novas
        return one

    def forget(self) -> None:
        """Have the recorders as at the beginning."""
        for nova in self.novas:
            nova.forget()

    def always(self, answer: Answer) -> None:
        """Have the recorders answer every request so from now on."""
        for nova in self.novas:
            nova.always(answer)

    def requests(self) -> list[Received]:
        """What any of them has received."""
        return [one for nova in self.novas for one in nova.requests]

    def identity(self, network: str, secret: str = SECRET) -> dict[bytes, bytes]:
        """The headers that tell Nova who asks, and no others may."""
        instance = INSTANCES[network]
        return {
            b"x-instance-id": instance.encode(),
            b"x-tenant-id": PROJECTS[network].encode(),
            b"x-instance-id-signature": signature_of(secret, instance).encode(),
            b"x-forwarded-for": self.guests[network].addresses[0].encode(),
        }


@dataclass(slots=True)
class NovaWorld(NovaGuests):
    """The same in a lab with a daemon."""

    lab: Lab
    daemon: Daemon

    def settings(
        self,
        endpoints: Sequence[Mapping[str, object]],
        *,
        fields: Mapping[str, object] | None = None,
        times: Mapping[str, object] | None = None,
    ) -> Mapping[str, Mapping[str, object]]:
        """The daemon's settings with these endpoints in the set `default`."""
        chosen = {
            "endpoints": list(endpoints),
            "secret_file": str(self.daemon.write_secret("secret", SECRET)),
            **(fields or {}),
        }
        nova = {**_TIMES, **(times or {}), "endpoint_sets": {"default": chosen}}
        return {"resolver": {"hold_s": 1.0}, "nova": nova}


def nova_instance(network: str, ident: str | None = None) -> RecordMapping:
    """The record of the guest of a network, as Nova's; by default with the id and project of its row above."""
    known = {"project": PROJECTS.get(network, "blue"), "upstream": "nova", "user_data": None}
    return instance(ident or INSTANCES[network], network, fields=known)


@contextlib.contextmanager
def prepare_nova_world(*, novas: int = 1, hosts: Path | None = None) -> Iterator[NovaWorld]:
    """The same without guests, its daemon not configured and not started."""
    with ExitStack() as stack:
        lab = Lab()
        stack.callback(lab.close)
        recorders = [
            stack.enter_context(Recorder(namespace=lab.host, secret=SECRET)) for _ in range(novas)
        ]
        daemon = Daemon(lab) if hosts is None else Daemon(lab, program=with_hosts(hosts))
        stack.callback(daemon.close)
        yield NovaWorld({}, recorders, lab, daemon)


@contextlib.contextmanager
def open_nova_world(*, novas: int = 1, hosts: Path | None = None) -> Iterator[NovaWorld]:
    """A lab with a daemon that has these Novas; all of it is gone at the end.

    Args:
        novas: How many there are; each takes requests that are signed with `SECRET`.
        hosts: What the daemon has for /etc/hosts, where that matters.
    """
    with prepare_nova_world(novas=novas, hosts=hosts) as world:
        networks = [world.lab.namespace_network(name) for name in INSTANCES]
        world.guests = {name: world.lab.guest(name) for name in INSTANCES}
        world.daemon.configure(world.settings([{"url": nova.url} for nova in world.novas]))
        world.daemon.start()
        world.daemon.put(networks, [nova_instance(name) for name in INSTANCES])
        until(
            lambda: world.daemon.status()["serving"] == len(networks), what="all networks' service"
        )
        yield world


@dataclass(frozen=True, slots=True)
class _LocalGuest(Guest):
    """Of a network whose listener is a port here."""

    def connect(
        self,
        *,
        to: str = IPV4,
        source: str | None = None,
        timeout_s: float | None = None,
        first: bytes = b"",
    ) -> Connection:
        del to, source
        place = (self.addresses[0], self.port)
        sock = socket.create_connection(place, 10 * patience() if timeout_s is None else timeout_s)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(first)
        return Connection(sock)


@contextlib.contextmanager
def open_nova_alone(response_s: float = RESPONSE_TIMEOUT_S) -> Iterator[NovaGuests]:
    """HAProxy alone in front of two Novas: what comes in chunks has no resolver to go to.

    Args:
        response_s: As of `NovaTimes`.
    """
    with ExitStack() as stack:
        recorders = [stack.enter_context(Recorder(secret=SECRET)) for _ in range(2)]
        times = NovaTimes(response_s=response_s, check="tcp", check_interval_s=0.2)
        ports = [one.port for one in recorders]
        alone = stack.enter_context(open_alone(nova=True, novas=ports, times=times))
        guests: dict[str, Guest] = {}
        for name, instance in INSTANCES.items():
            signature = signature_of(SECRET, instance)
            record = NovaRecord("default", InstanceId(instance), PROJECTS[name], (signature,))
            alone.write(name, render_map_value(record))
            guests[name] = _LocalGuest(name, "", name, "", ("127.0.0.1",), port=alone.ports[name])
        yield NovaGuests(guests, recorders)
