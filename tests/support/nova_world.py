"""A lab whose instances' documents Nova has, and recorders in Nova's place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from support.daemon import Daemon
from support.forgeries import OTHER_INSTANCE, OTHER_PROJECT
from support.guest import Guest
from support.lab import Lab, RecordMapping, until
from support.own_hosts import with_hosts
from support.recorder import Received, Recorder, signature_of

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
class NovaWorld:
    """Two networks with a guest each, both of the same addresses.

    Attributes:
        novas: Where requests go, in the order of the settings.
    """

    lab: Lab
    daemon: Daemon
    guests: Mapping[str, Guest]
    novas: Sequence[Recorder]
    _stack: ExitStack = field(default_factory=ExitStack)

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

    def secret_file(self, name: str, text: str) -> Path:
        """Write a secret down."""
        file = self.daemon.directory / name
        file.write_text(f"{text}\n")
        file.chmod(0o600)
        return file

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
            "secret_file": str(self.secret_file("secret", SECRET)),
            **(fields or {}),
        }
        nova = {**_TIMES, **(times or {}), "endpoint_sets": {"default": chosen}}
        return {"resolver": {"hold_s": 1.0}, "nova": nova}

    def take_over(self, settings: Mapping[str, Mapping[str, object]]) -> None:
        """Change the daemon's settings while it runs; in force at the return."""
        self.daemon.reconfigure(settings)

    def forget(self) -> None:
        """Have the recorders as at the beginning."""
        for nova in self.novas:
            nova.forget()

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


def nova_instance(network: str, number: int = 5) -> RecordMapping:
    """The record of the guest of a network."""
    return {
        "id": INSTANCES[network],
        "name": network,
        "project": PROJECTS[network],
        "upstream": "nova",
        "ports": [
            {
                "network": network,
                "mac": f"fa:16:3e:00:{number >> 8:02x}:{number & 255:02x}",
                "addresses": [f"10.0.0.{number}", f"2001:db8::{number:x}"],
            }
        ],
    }


@contextlib.contextmanager
def open_nova_world(
    *, novas: int = 1, secret: str | None = SECRET, hosts: Path | None = None
) -> Iterator[NovaWorld]:
    """A lab with a daemon that has these Novas; all of it is gone at the end.

    Args:
        novas: How many there are; each takes requests that are signed with `secret`.
        hosts: What the daemon has for /etc/hosts, where that matters.
    """
    with ExitStack() as stack:
        lab = Lab()
        stack.callback(lab.close)
        recorders = [
            stack.enter_context(Recorder(namespace=lab.host, secret=secret)) for _ in range(novas)
        ]
        daemon = Daemon(lab) if hosts is None else Daemon(lab, program=with_hosts(hosts))
        stack.callback(daemon.close)
        networks = [lab.namespace_network(name) for name in INSTANCES]
        guests = {name: lab.guest(name) for name in INSTANCES}
        world = NovaWorld(lab, daemon, guests, recorders)
        daemon.configure(world.settings([{"url": nova.url} for nova in recorders]))
        daemon.start()
        daemon.put(networks, [nova_instance(name) for name in INSTANCES])
        until(lambda: daemon.status()["serving"] == len(networks), what="all networks' service")
        yield world
