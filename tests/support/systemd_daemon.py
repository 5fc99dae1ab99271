"""imdsproxy installed as its units in a machine of its own, two networks with equal addresses, a guest in each."""

import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, cast

from imdsproxy.api.client import AdminClient
from support.demonstration import REPOSITORY
from support.guest import Guest, Reply
from support.lab import until
from support.systemd_machine import Machine, systemd_machine

CONTROLLER: Final = "imdsproxy.service"
HAPROXY: Final = "imdsproxy-haproxy.service"
DOCUMENTS: Final = "imdsproxy-documents.service"
UNITS: Final = (CONTROLLER, HAPROXY, DOCUMENTS)
HUB: Final = "imdsproxy-hub.service"
IDENTITY: Final = "imdsproxy-identity.service"
SIGNER: Final = "imdsproxy-signer.service"
HUB_SIGNER: Final = "imdsproxy-hub-signer.service"

USER_DATA: Final = "/latest/user-data"

_LOAD_SETTINGS: Final = "/etc/imdsproxy/conf.d/load.yaml"
_TEST_SETTINGS: Final = "/etc/imdsproxy/conf.d/test.yaml"
_DROP_IN: Final = f"/etc/systemd/system/{CONTROLLER}.d/test.conf"
_REMOVE_PLUGGED: Final = """
for namespace in $(ip netns list | cut -d " " -f 1); do
    case $namespace in net-blue | net-red | guest-blue | guest-red | imds*) ;;
        *) ip netns delete "$namespace" ;;
    esac
done
for bridge in $(ip -o link show type bridge | cut -d " " -f 2 | tr -d :); do
    ip link delete "$bridge"
done
"""
PROGRAM: Final = "/usr/local/bin/imdsproxy"
_GUESTS: Final = {"blue": "fa:16:3e:00:00:01", "red": "fa:16:3e:00:00:02"}
_SETTINGS: Final = (
    *("ipv6/conf/all/accept_dad=0", "ipv6/conf/default/accept_dad=0"),
    *("ipv6/conf/default/addr_gen_mode=0", "ipv6/conf/default/accept_ra=0"),
)


def own_user_data(guest: Guest, reply: Reply) -> str | None:
    """What is wrong with a guest's answer for its user-data."""
    if reply.status == 200 and reply.text == f"#!/bin/sh\necho {guest.name}\n":
        return None
    return f"{guest.name}: {reply.status} {reply.body[:80]!r}"


def named(guest: Guest, reply: Reply) -> str | None:
    """What is wrong with a guest's answer for its `meta_data.json`."""
    right = reply.status == 200 and f'"{guest.name}"' in reply.text
    return None if right else f"{guest.name}: {reply.status} {reply.body[:80]!r}"


def serves(guest: Guest) -> bool:
    """Whether a guest is answered in time, with its own."""
    return guest.is_served(USER_DATA, own_user_data, timeout_s=1)


def wait_served(*guests: Guest) -> None:
    for guest in guests:
        until(partial(serves, guest), within_s=10, what=f"documents for {guest.name}")


@dataclass(slots=True)
class UnitDaemon:
    """The installed daemon."""

    machine: Machine
    guests: tuple[Guest, ...] = ()

    def configure(self, text: str) -> None:
        """Write settings that `restore` takes away; they are read at the next start or reload."""
        self.machine.write(_TEST_SETTINGS, text)

    def set_service(self, *lines: str) -> None:
        """Set options in the section `Service` of the controller's unit, until `restore`."""
        self.machine.write(_DROP_IN, "\n".join(("[Service]", *lines, "")))
        self.machine.run("systemctl", "daemon-reload")

    def restore(self) -> None:
        """Make everything as it was after `plug_in`, `raise_limits` and `start`; forget what was logged."""
        places = (_TEST_SETTINGS, _DROP_IN)
        removed = self.machine.run("rm", "--force", "--verbose", *places)
        if removed:
            self.machine.run("systemctl", "stop", CONTROLLER)
            self.machine.run("systemctl", "daemon-reload")
        self.machine.run("systemctl", "reset-failed")
        self.machine.run("systemctl", "start", CONTROLLER)
        for unit in UNITS:
            self.wait_active(unit)
        for kind in ("instances", "networks"):
            listed = cast("list[Mapping[str, Any]]", self.admin.get(f"/v1/{kind}"))
            for ident in {one["record"]["id"] for one in listed} - _GUESTS.keys():
                self.admin.request("DELETE", f"/v1/{kind}/{ident}")
        self.machine.run("sh", "-eu", "-c", _REMOVE_PLUGGED)
        self.machine.forget_journal()

    def install(self) -> None:
        """Install it as docs/how-to/install.md says, with the program of this repository."""
        # The machine has what this host has, which may be an imdsproxy that is installed.
        self.machine.run("ln", "-sf", f"{Path(sys.executable).parent}/imdsproxy", PROGRAM)
        # What is installed lies where a service may look; this Python and this checkout may not.
        places = {Path(sys.base_prefix).parts[1], REPOSITORY.parts[1]}
        lines = [
            *(["ProtectHome=read-only"] if places & {"root", "home"} else []),
            *(["PrivateTmp=no"] if places & {"tmp", "var"} else []),
        ]
        if lines:
            for unit in (DOCUMENTS, HUB, HUB_SIGNER, IDENTITY, SIGNER):
                drop_in = f"/etc/systemd/system/{unit}.d/places.conf"
                self.machine.write(drop_in, "\n".join(["[Service]", *lines, ""]))
        self.machine.run(f"{REPOSITORY}/packaging/install")

    def raise_limits(self) -> None:
        """Have guests served who ask for more in a second than one that boots does in a day."""
        said = "limits: {requests_per_s: 25000, burst: 1000000, connections: 10000}\n"
        self.machine.write(_LOAD_SETTINGS, said)
        self.machine.run("systemctl", "try-reload-or-restart", CONTROLLER)

    def remove_settings_of_load(self) -> None:
        """Take away what `raise_limits` wrote, before a package that knows nothing of it is removed."""
        self.machine.run("rm", "-f", _LOAD_SETTINGS)

    def plug_in(self) -> None:
        """Make the networks and their guests."""
        self.guests = tuple(self.plug_in_one(name, mac) for name, mac in _GUESTS.items())

    def plug_in_one(self, name: str, mac: str) -> Guest:
        """Make the namespace of a network, and a guest in it."""
        self.machine.run("ip", "netns", "add", f"net-{name}")
        self.machine.run("ip", "netns", "add", f"guest-{name}")
        for namespace in (f"net-{name}", f"guest-{name}"):
            for setting in _SETTINGS:
                key, _, value = setting.partition("=")
                self.inside(namespace, "sh", "-c", f"echo {value} >/proc/sys/net/{key}")
            self.machine.run("ip", "-n", namespace, "link", "set", "lo", "up")
        batch = f"""
link add eth0 type veth peer name eth0 address {mac} netns guest-{name}
address add 169.254.169.254/32 dev eth0
address add fe80::a9fe:a9fe/64 dev eth0 nodad
link set eth0 up
route add 10.0.0.0/24 dev eth0
"""
        self.machine.run("ip", "-n", f"net-{name}", "-batch", "-", text=batch)
        return self._guest(name, mac)

    def _guest(self, name: str, mac: str) -> Guest:
        batch = """
address add 10.0.0.11/24 dev eth0
link set eth0 up
route add 169.254.169.254/32 dev eth0
"""
        self.machine.run("ip", "-n", f"guest-{name}", "-batch", "-", text=batch)
        place = self.machine.root / "run/netns"
        return Guest(name, f"guest-{name}", name, mac, ("10.0.0.11",), directory=place)

    def plug_in_behind_a_bridge(self, name: str, mac: str) -> Guest:
        """A guest on a bridge of the machine, which has no namespace for the network."""
        self.machine.run("ip", "netns", "add", f"guest-{name}")
        batch = f"""
link add br-{name} type bridge forward_delay 0
link set br-{name} up
link add port-{name} master br-{name} up type veth peer name eth0 address {mac} netns guest-{name}
"""
        self.machine.run("ip", "-batch", "-", text=batch)
        return self._guest(name, mac)

    def start(self) -> None:
        """Start the controller, and tell it of the networks and guests that are plugged in."""
        self.machine.run("systemctl", "start", CONTROLLER)
        listeners = {one.network: {"namespace": f"net-{one.network}"} for one in self.guests}
        self.put(listeners, self.guests)

    def put(self, listeners: Mapping[str, Mapping[str, str]], guests: Iterable[Guest]) -> None:
        """Add networks and guests."""
        cidr = "10.0.0.0/24"
        networks = [
            {"id": name, "listener": dict(how), "subnets": [{"cidr": cidr}]}
            for name, how in listeners.items()
        ]
        instances = [
            {
                "id": one.name,
                "name": one.name,
                "ports": [
                    {"network": one.network, "mac": one.mac, "addresses": list(one.addresses)}
                ],
                "user_data": f"#!/bin/sh\necho {one.name}\n",
            }
            for one in guests
        ]
        records = {"networks": networks, "instances": instances}
        body = {name: value for name, value in records.items() if value}
        self.admin.request("POST", "/v1/records", body=body)

    @property
    def admin(self) -> AdminClient:
        """Its admin socket, as this host reaches it: a command takes half a second of a processor."""
        return AdminClient(self.machine.root / "run/imdsproxy/admin.sock")

    def command(self, *arguments: str) -> str:
        """Run the command line, which must succeed."""
        return self.machine.run(PROGRAM, *arguments)

    def status(self) -> Mapping[str, Any]:
        """What the controller says of itself."""
        return cast("Mapping[str, Any]", self.admin.get("/v1/status"))

    def inside(self, namespace: str, *command: str) -> str:
        """Run a command in a network namespace of the machine."""
        return self.machine.run("nsenter", f"--net=/run/netns/{namespace}", *command)

    def pids(self) -> tuple[int, int, int]:
        """The main processes of the three units."""
        controller, haproxy, documents = (self.machine.main_pid(unit) for unit in UNITS)
        return controller, haproxy, documents

    def active(self) -> dict[str, str]:
        """Each unit's state."""
        return {unit: self.machine.unit(unit, "ActiveState") for unit in UNITS}

    def wait_active(self, unit: str = CONTROLLER, *, within_s: float = 20.0) -> float:
        """Wait until systemd calls a unit active."""
        return until(
            lambda: self.machine.unit(unit, "ActiveState") == "active",
            within_s=within_s,
            what=f"{unit} active; {self.active()}",
        )


@contextlib.contextmanager
def installed(
    tmp_path: Path, propagation: Literal["shared", "private"] = "shared"
) -> Iterator[UnitDaemon]:
    """A machine with imdsproxy on it, not started."""
    work = tmp_path / "machine"
    work.mkdir()
    with systemd_machine(work, propagation=propagation) as machine:
        daemon = UnitDaemon(machine)
        with journal_of_failures(daemon):
            daemon.install()
            yield daemon


@contextlib.contextmanager
def journal_of_failures(daemon: UnitDaemon) -> Iterator[None]:
    try:
        yield
    except BaseException:
        print(daemon.machine.journal())  # noqa: T201 - pytest shows it of a test that failed
        raise
