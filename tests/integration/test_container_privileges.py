"""Each capability that the container is granted is needed: all of them are enough, and without one something breaks."""

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import pytest

from support.container import CAPABILITIES
from support.daemon import Daemon, instance
from support.demonstration import REPOSITORY
from support.guest import Guest
from support.lab import Lab, ip, until
from support.world import own_name, reads_own

pytestmark = [pytest.mark.root, pytest.mark.slow]

_SEEN_S: Final = 2.0
_ADDRESS: Final = ("169.254.169.254/32", "dev", "br0")


@dataclass(slots=True)
class Host:
    """Networks with a guest each, and a daemon that was started before: its files are there."""

    lab: Lab
    daemon: Daemon
    guests: tuple[Guest, ...]

    def run(self, capabilities: Iterable[str]) -> str | None:
        """Live once with these capabilities alone; the first thing that is not as it should be."""
        names = ",".join(f"+{name.removeprefix('CAP_').lower()}" for name in capabilities)
        setpriv = ("/usr/bin/setpriv", f"--bounding-set=-all,{names}", "--inh-caps=-all", "--")
        self.daemon.program = (*setpriv, sys.executable, "-m", "imdsproxy")
        try:
            return self._live()
        except AssertionError as error:
            return str(error)
        finally:
            self.daemon.stop()

    def _live(self) -> str | None:
        self.daemon.start(ready=False)
        until(self._in_order, within_s=_SEEN_S, what="service for all")
        place = self.lab.name("red")
        ip("-n", place, "address", "del", *_ADDRESS)
        try:
            until(lambda: self._unserved("red"), within_s=_SEEN_S, what="red without its address")
        finally:
            ip("-n", place, "address", "add", *_ADDRESS)
        until(self._in_order, within_s=_SEEN_S, what="service for all again")
        self.daemon.command("stop", "--data-plane")
        process = self.daemon.process
        assert process is not None
        ended = process.wait(_SEEN_S * 10)
        return f"it ended with {ended}" if ended else None

    def _unserved(self, network: str) -> bool:
        return network in self.daemon.not_served()

    def _in_order(self) -> bool:
        status = self.daemon.status()
        fault = status["not_served"] or status["readiness"]["degraded"]
        return not fault and all(reads_own(guest) for guest in self.guests)


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    lab = Lab()
    # What no event reports is not looked for: events are to be received.
    daemon = Daemon(lab, {"host": {"name_prefix": lab.prefix, "audit_per_second": 0}})
    try:
        networks = [lab.namespace_network("red"), lab.bridge_network("blue")]
        guests = tuple(lab.guest(str(one["id"])) for one in networks)
        daemon.start()
        daemon.put(networks, [instance(own_name(one), one.network) for one in guests])
        daemon.stop()
        yield Host(lab, daemon, guests)
    finally:
        daemon.close()
        lab.close()


def test_the_capabilities_of_the_container_are_enough(host: Host) -> None:
    assert host.run(CAPABILITIES) is None


def test_no_unit_has_a_capability_that_the_container_does_without() -> None:
    for name in ("imdsproxy", "imdsproxy-haproxy", "imdsproxy-documents"):
        text = (REPOSITORY / f"packaging/systemd/{name}.service").read_text()
        (granted,) = re.findall(r"^CapabilityBoundingSet=(.+)$", text, re.MULTILINE)
        assert set(granted.split()) <= CAPABILITIES, name


@pytest.mark.parametrize("missing", sorted(CAPABILITIES))
def test_without_one_of_them_something_breaks(host: Host, missing: str) -> None:
    assert host.run(CAPABILITIES - {missing}) is not None
