"""Faults of a host, each with the alerts that it is to fire."""

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from support.agent_socket import squat
from support.daemon import instance
from support.guest import IPV4, Background, Guest, Lost, inside
from support.impostor import claim_frame, mac_of_service, open_wire
from support.lab import until, within
from support.monitored import Monitored
from support.recorder import RESET, reply

_SLOW_S: Final = 6.0
"""A change that takes longer is in a bucket above five seconds."""

_DATA: Final = "/latest/user-data"
_BROKEN: Final = "haproxy: [\n"


Cause = Callable[[Monitored], contextlib.AbstractContextManager[object]]


@dataclass(frozen=True, slots=True)
class Fault:
    """What is done to the host until the end of the `with` block, and the alerts that it is to fire."""

    cause: Cause
    alerts: tuple[str, ...]


class _Often(Background):
    """Guests that ask again and again, whatever the answer is."""

    def __init__(self, *asks: Callable[[], object]) -> None:
        def again(ask: Callable[[], object]) -> None:
            while not self._stop.is_set():
                with contextlib.suppress(Lost, OSError):
                    ask()
                time.sleep(0.05)

        super().__init__(*(partial(again, ask) for ask in asks))


class _Once(Background):
    """What is waited for at the end of the `with` block."""

    def __init__(self, work: Callable[[], object]) -> None:
        def once() -> None:
            work()

        super().__init__(once)


# What is wrong with records, networks and settings while all processes run


@contextlib.contextmanager
def _two_claim_an_address(host: Monitored) -> Iterator[None]:
    file = host.records / "twin.json"
    file.write_text(json.dumps({"instances": [instance("twin", "blue")]}))
    yield
    file.unlink()


@contextlib.contextmanager
def _a_broken_record(host: Monitored) -> Iterator[None]:
    file = host.records / "broken.yaml"
    file.write_text("instances: [{id: 5}]\n")
    yield
    file.unlink()


@contextlib.contextmanager
def _a_network_without_namespace(host: Monitored) -> Iterator[None]:
    network = host.world.lab.namespace_network("away")
    host.world.lab.delete_namespace("away")
    host.daemon.put([network])
    yield
    host.daemon.remove_network("away")


@contextlib.contextmanager
def _another_program_on_the_port(host: Monitored) -> Iterator[None]:
    lab = host.world.lab
    network = lab.namespace_network("busy")
    intruder = lab.intrude(lab.name("busy"), IPV4, reuse_port=True)
    host.daemon.put([network])
    yield
    intruder.stop()
    host.daemon.remove_network("busy")


@contextlib.contextmanager
def _the_filters_port_is_taken(host: Monitored) -> Iterator[None]:
    lab = host.world.lab
    network = lab.namespace_network("held")
    with inside(lab.name("held"), socket.socket) as holder:
        holder.bind(("0.0.0.0", 254))
        holder.listen()
        host.daemon.put([network], [instance("held-7", "held", 7)])
        yield
    host.daemon.remove_instance("held-7")
    host.daemon.remove_network("held")


@contextlib.contextmanager
def _a_device_that_takes_no_address(host: Monitored) -> Iterator[None]:
    lab = host.world.lab
    network = lab.interface_network("stiff")
    place = Path("/proc/sys/net/ipv6/conf/stiff/disable_ipv6")
    inside(lab.host, lambda: place.write_text("1"))
    host.daemon.put([network])
    yield
    host.daemon.remove_network("stiff")


@contextlib.contextmanager
def _broken_settings(host: Monitored) -> Iterator[None]:
    good = host.daemon.config.read_text()
    host.daemon.config.write_text(_BROKEN)
    host.daemon.command("reload", "--socket", str(host.daemon.runtime / "admin.sock"))
    yield
    host.daemon.config.write_text(good)
    host.daemon.reconfigure(host.settings())


@contextlib.contextmanager
def _no_room_on_the_disk(host: Monitored) -> Iterator[None]:
    ballast = host.daemon.state / "ballast"
    with ballast.open("wb") as file, contextlib.suppress(OSError):
        room = os.statvfs(host.daemon.state)
        file.write(bytes(room.f_bavail * room.f_frsize - 300_000))
    yield
    ballast.unlink()


@contextlib.contextmanager
def _few_files_allowed(host: Monitored) -> Iterator[None]:
    pid = host.daemon.status()["controller"]
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    opened = len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208 - names only
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (opened + 5, before[1]))
    yield
    resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


@contextlib.contextmanager
def _the_audit_log_has_no_directory(host: Monitored) -> Iterator[None]:
    place = host.daemon.directory / "log"
    place.rename(place.with_name("gone"))
    yield
    place.with_name("gone").rename(place)


@contextlib.contextmanager
def _no_reader_of_the_audit_log(host: Monitored) -> Iterator[None]:
    def lost() -> bool:
        with host.world.looking_away():
            url = f"http://{IPV4}/{'long/' * 200}"
            words = ("/usr/bin/wrk", "-t1", "-c16", "-d2s", "-H", f"User-Agent: {'x' * 200}", url)
            where = within(host.world.guests["grey"].namespace)
            subprocess.run((*where, *words), check=True, capture_output=True)
        audit = host.daemon.status()["audit"]
        return bool(audit["lost"])

    until(lost, within_s=30, what="lines that are lost")
    yield


@contextlib.contextmanager
def _an_agent_takes_the_socket(host: Monitored) -> Iterator[None]:
    for _ in range(2):
        before = host.daemon.status()["unix_listener"]["taken_over"]
        with squat(host.agent_socket, namespace=host.world.lab.host):
            until(
                lambda before=before: host.daemon.status()["unix_listener"]["taken_over"] > before  # type: ignore[misc] # mypy cannot see the default's type
            )
    yield


@contextlib.contextmanager
def _the_socket_is_left_to_an_agent(host: Monitored) -> Iterator[None]:
    unix = {**host.world.settings["unix_listener"], "take_over": False}
    host.daemon.reconfigure(host.settings(unix_listener=unix))
    with squat(host.agent_socket, namespace=host.world.lab.host):
        yield
    host.daemon.reconfigure(host.settings())


# What guests do


@contextlib.contextmanager
def _guests_that_are_refused(host: Monitored) -> Iterator[None]:
    """Over a limit, without a token, with another's address, with what is no HTTP, too many at once, not known.

    And one that claims another's address by ARP.
    """
    red, green, blue, grey = (host.world.guests[name] for name in ("red", "green", "blue", "grey"))
    policy = {
        "instances": {"red-5": {"burst": 10}},
        "networks": {"green": {"tokens": "required"}},
    }
    host.daemon.reconfigure(host.settings(policy=policy))
    host.daemon.put(instances=[instance("other", "grey", 77)])
    unknown = [host.world.lab.guest("red", 100 + number) for number in range(12)]

    def malformed() -> None:
        blue.raw(b"GARBAGE\r\n\r\n")

    def impostor() -> None:
        with host.world.lab.neighbour("grey", "10.0.0.77", grey.mac):
            grey.ask(_DATA, source="10.0.0.77")

    grey.ask(_DATA)
    claim = claim_frame(grey.mac, "10.0.0.77", mac_of_service(grey, IPV4))
    wire = open_wire(grey.namespace, grey.device, timeout_s=1)
    asks: list[Callable[[], object]] = [
        partial(wire.send, claim),
        *[partial(red.ask, _DATA)] * 6,
        partial(green.ask, _DATA),
        malformed,
    ]
    asks += [partial(one.ask, _DATA) for one in unknown]
    with closing(wire), _Often(*asks):
        subprocess.run(
            (*within(grey.namespace), "ip", "address", "add", "10.0.0.77/24", "dev", "eth0"),
            check=True,
        )
        impostor()
        yield
    for guest in unknown:
        host.world.lab.remove_guest(guest)
    host.daemon.remove_instance("other")
    host.daemon.reconfigure(host.settings())


@contextlib.contextmanager
def _a_record_that_comes_after_its_guest(host: Monitored) -> Iterator[None]:
    guest = host.world.lab.guest("blue", 200)
    late = _Once(lambda: guest.ask(_DATA))
    with late:
        time.sleep(2.5)
        host.daemon.put(instances=[instance("late", "blue", 200)])
    yield
    host.daemon.remove_instance("late")
    host.world.lab.remove_guest(guest)


@contextlib.contextmanager
def _connections_that_outlast_reloads(host: Monitored) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            connection = stack.enter_context(host.world.red.connect())
            connection.request(_DATA)
            host.world.reload()
        yield


@contextlib.contextmanager
def _more_connections_than_haproxy_has(host: Monitored) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for number in range(144):
            guest = host.world.guests[("red", "green", "blue", "grey")[number % 4]]
            stack.enter_context(guest.connect())
        yield


@contextlib.contextmanager
def _a_stranger_while_neutron_is_away(host: Monitored) -> Iterator[None]:
    assert host.stranger.ask(_DATA).status == 503
    yield


@contextlib.contextmanager
def _as_it_is(_host: Monitored) -> Iterator[None]:
    """The second daemon has its faults from the beginning."""
    yield


# Nova


def _ask_nova(host: Monitored) -> Callable[[], object]:
    guest: Guest = host.world.guests["nova"]
    return lambda: guest.ask("/latest/meta-data/instance-id")


@contextlib.contextmanager
def _novas_that_refuse_and_that_break_off(host: Monitored) -> Iterator[None]:
    """One has another secret; the other answers checks alone."""
    ask = _ask_nova(host)
    host.novas[0].always(reply(status=403))
    host.novas[1].always(RESET)
    with _Often(ask, ask):
        yield
    for nova in host.novas:
        nova.forget()
    # A secret is good again once a guest gets an answer.
    until(lambda: ask() and host.daemon.status()["readiness"]["ready"], what="being ready")


@contextlib.contextmanager
def _a_nova_is_down(host: Monitored) -> Iterator[None]:
    host.novas[1].kill()
    yield
    host.novas[1].listen()


@contextlib.contextmanager
def _all_novas_are_down(host: Monitored) -> Iterator[None]:
    for nova in host.novas:
        nova.kill()
    yield
    for nova in host.novas:
        nova.listen()


# Processes


@contextlib.contextmanager
def _a_signer_that_does_not_start(host: Monitored) -> Iterator[None]:
    ring = host.daemon.state / "identity/keys/ring.json"
    good = ring.read_bytes()
    ring.write_text("damaged")
    os.kill(int((host.daemon.runtime / "signer.pid").read_text().split()[0]), signal.SIGKILL)
    yield
    ring.write_bytes(good)


@contextlib.contextmanager
def _a_document_server_that_does_not_start(host: Monitored) -> Iterator[None]:
    good = host.daemon.config.read_text()
    host.daemon.config.write_text(_BROKEN)
    for pid in host.daemon.status()["documents"]["pids"]:
        os.kill(pid, signal.SIGKILL)
    yield
    host.daemon.config.write_text(good)
    until(lambda: len(host.daemon.status()["documents"]["pids"]) == 3, what="its return")


@contextlib.contextmanager
def _no_haproxy(host: Monitored) -> Iterator[None]:
    host.haproxy.unlink()
    host.haproxy.write_text("#!/bin/sh\necho it is broken\nexit 1\n")
    host.haproxy.chmod(0o755)
    yield
    host.haproxy.unlink()
    host.haproxy.symlink_to("/usr/sbin/haproxy")


@contextlib.contextmanager
def _a_configuration_that_is_refused(host: Monitored) -> Iterator[None]:
    network = host.world.lab.namespace_network("more")
    # It returns when the network is served, and that is after the fault.
    with _Once(lambda: host.daemon.put([network])), _no_haproxy(host):
        yield
    host.daemon.remove_network("more")


@contextlib.contextmanager
def _haproxy_does_not_come_back(host: Monitored) -> Iterator[None]:
    master, began = host.daemon.pids().master, time.monotonic()
    slow = [instance("slow", "blue", 201)]
    with contextlib.ExitStack() as stack:
        # As above.
        stack.enter_context(_Once(lambda: host.daemon.put(instances=slow)))
        stack.enter_context(_no_haproxy(host))
        os.kill(master, signal.SIGKILL)
        yield
        until(lambda: time.monotonic() - began > _SLOW_S)
    host.daemon.wait_ready(within_s=20)
    host.daemon.remove_instance("slow")


@contextlib.contextmanager
def _haproxy_is_killed(host: Monitored) -> Iterator[None]:
    master = host.daemon.pids().master
    os.kill(master, signal.SIGKILL)
    until(lambda: host.world.has_other_master(master))
    yield


@contextlib.contextmanager
def _a_controller_that_dies_again_and_again(host: Monitored) -> Iterator[None]:
    for _ in range(3):
        host.daemon.kill_controller()
        host.daemon.start(ready=False)
    host.daemon.kill_controller()
    yield
    host.daemon.start()


@contextlib.contextmanager
def _all_is_stopped(host: Monitored) -> Iterator[None]:
    host.daemon.stop()
    yield
    host.daemon.start()


TOGETHER: Final = (
    (
        Fault(_two_claim_an_address, ("ImdsproxyConflicts",)),
        Fault(_a_broken_record, ("ImdsproxyRecordsRefused",)),
        Fault(_a_network_without_namespace, ("ImdsproxyNetworkNotServed",)),
        Fault(_another_program_on_the_port, ("ImdsproxyForeignListener",)),
        Fault(_the_filters_port_is_taken, ("ImdsproxyMacFilterMissing",)),
        Fault(_a_device_that_takes_no_address, ("ImdsproxyPlanFailing",)),
        Fault(_no_room_on_the_disk, ("ImdsproxyDiskFull",)),
        Fault(_the_audit_log_has_no_directory, ("ImdsproxyAuditFailing",)),
        Fault(_an_agent_takes_the_socket, ("ImdsproxyUnixListenerContested",)),
        Fault(_a_record_that_comes_after_its_guest, ("ImdsproxySlowLookUps",)),
        Fault(_a_stranger_while_neutron_is_away, ("ImdsproxyMissesUnavailable",)),
        Fault(_as_it_is, ("ImdsproxyClockWrong", "ImdsproxyNeutronUnreachable", "ImdsproxySourceNotInSync")),
        Fault(_a_nova_is_down, ("ImdsproxyNovaEndpointDown",)),
        Fault(_few_files_allowed, ("ImdsproxyFewFileDescriptors",)),
        Fault(_broken_settings, ("ImdsproxySettingsRefused",)),
    ),
    (
        Fault(
            _guests_that_are_refused,
            (
                "ImdsproxyGuestsLimited",
                "ImdsproxyRequestsDenied",
                "ImdsproxyMalformedRequests",
                "ImdsproxyTokensMissing",
                "ImdsproxyReadsWithoutToken",
                "ImdsproxyMacMismatch",
                "ImdsproxyForgedClaims",
                "ImdsproxyMissesOverLimit",
                "ImdsproxyUnknownGuests",
            ),
        ),
        Fault(_connections_that_outlast_reloads, ("ImdsproxyOldWorkers",)),
    ),
    (
        Fault(_no_reader_of_the_audit_log, ("ImdsproxyAuditLinesLost",)),
        Fault(_novas_that_refuse_and_that_break_off, ("ImdsproxyNovaRefusesSecret", "ImdsproxyNovaFailing")),
        Fault(_a_configuration_that_is_refused, ("ImdsproxyReloadFailed",)),
    ),
    (
        Fault(_the_socket_is_left_to_an_agent, ("ImdsproxyUnixListenerDown",)),
        Fault(_all_novas_are_down, ("ImdsproxyNovaDown",)),
        Fault(_a_signer_that_does_not_start, ("ImdsproxyIdentityFailing",)),
        Fault(_more_connections_than_haproxy_has, ("ImdsproxyHaproxyFull",)),
    ),
    (
        Fault(_haproxy_does_not_come_back, ("ImdsproxyHaproxyDown", "ImdsproxyCommandsFailing")),
        Fault(_a_document_server_that_does_not_start, ("ImdsproxyDocumentServerDown", "ImdsproxyNotReady")),
    ),
    (Fault(_haproxy_is_killed, ("ImdsproxyProcessRestarted", "ImdsproxySlowChanges")),),
    (Fault(_a_controller_that_dies_again_and_again, ("ImdsproxyDown", "ImdsproxyControllerRestarting")),),
    (Fault(_all_is_stopped, ("ImdsproxyHaproxyExporterDown",)),),
)  # fmt: skip
"""Faults that are there at the same time, after those before them have gone."""
