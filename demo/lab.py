"""The lab: namespaces, bridges, cables, addresses. Nothing touches the machine's own network.

All links live inside namespaces whose names begin with `imdsdemo-`, so that removing those names
(after ending the processes in them) removes everything, whatever a killed run left behind.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from demo.processes import CommandError, end_processes, inside, run
from demo.roster import (
    CIDR4,
    CIDR6,
    DAEMON_PREFIX,
    GATEWAY4,
    GATEWAY6,
    HOST_NAMESPACE,
    PREFIX,
    Guest,
    LabNetwork,
)

__all__ = [
    "build",
    "forget_folder",
    "leftovers",
    "plan_links",
    "plan_namespaces",
    "remember_folder",
    "sweep",
]

_NETNS: Final = Path("/run/netns")
_SETTINGS: Final = {
    "ipv6/conf/all/disable_ipv6": 0,
    "ipv6/conf/default/disable_ipv6": 0,
    # Link-local addresses are usable at once and made of the MAC address, whatever the default.
    "ipv6/conf/default/accept_dad": 0,
    "ipv6/conf/default/addr_gen_mode": 0,
    "ipv6/conf/default/accept_ra": 0,
}
_METADATA4: Final = "169.254.169.254/32"
_METADATA6: Final = "fe80::a9fe:a9fe/64"


def plan_namespaces(networks: Sequence[LabNetwork], guests: Sequence[Guest]) -> list[str]:
    """The namespaces' names, each once."""
    names = [HOST_NAMESPACE, *(network.namespace for network in networks)]
    names += [guest.netns for guest in guests]
    return list(dict.fromkeys(names))


def plan_links(
    networks: Sequence[LabNetwork], guests: Sequence[Guest]
) -> Iterator[tuple[str, list[str]]]:
    """Each namespace with the lines for `ip -batch` there, in the order in which they must run."""
    for network in networks:
        yield network.namespace, list(_bridge_lines(network))
    homes = {network.id: network.namespace for network in networks}
    for guest in guests:
        yield homes[guest.network], list(_cable_lines(guest))
        yield guest.netns, list(_guest_lines(guest))


def _bridge_lines(network: LabNetwork) -> Iterator[str]:
    bridge = network.id
    yield f"link add {bridge} type bridge forward_delay 0 stp_state 0"
    if network.routed:
        yield f"address add {GATEWAY4}/{CIDR4.partition('/')[2]} dev {bridge}"
        yield f"address add {GATEWAY6}/{CIDR6.partition('/')[2]} dev {bridge} nodad"
    if network.metadata:
        yield f"address add {_METADATA4} dev {bridge}"
        yield f"address add {_METADATA6} dev {bridge} nodad"
    yield f"link set {bridge} up"


def _cable_lines(guest: Guest) -> Iterator[str]:
    end = guest.name
    yield (f"link add {end} type veth peer name eth0 address {guest.mac} netns {guest.netns}")
    yield f"link set {end} master {guest.network} up"


def _guest_lines(guest: Guest) -> Iterator[str]:
    yield "link set lo up"
    yield f"address add {guest.ipv4}/{CIDR4.partition('/')[2]} dev eth0"
    yield f"address add {guest.ipv6}/{CIDR6.partition('/')[2]} dev eth0 nodad"
    yield "link set eth0 up"
    yield "route add 169.254.169.254/32 dev eth0"


def build(networks: Sequence[LabNetwork], guests: Sequence[Guest]) -> None:
    """Makes all of it.

    Raises:
        CommandError: The machine refused something; `sweep` removes what there is so far.
    """
    for name in plan_namespaces(networks, guests):
        run(["ip", "netns", "add", name])
        _write_settings(name)
    run(["ip", "-n", HOST_NAMESPACE, "link", "set", "lo", "up"])
    for namespace, lines in plan_links(networks, guests):
        run(["ip", "-n", namespace, "-batch", "-"], stdin="\n".join(lines) + "\n")


def _write_settings(namespace: str) -> None:
    script = "\n".join(f"echo {value} >/proc/sys/net/{key}" for key, value in _SETTINGS.items())
    run(inside(namespace, ["sh", "-eu"]), stdin=script)


def remember_folder(mark: Path) -> None:
    """Notes in `mark`, before `ip netns` makes it, that the machine had no `/run/netns`."""
    if not _NETNS.exists():
        mark.touch()


def forget_folder(mark: Path) -> None:
    """Takes `/run/netns` away where `mark` says that it is the lab's, and nobody else uses it."""
    if not mark.exists():
        return
    if _NETNS.is_dir() and not any(_NETNS.iterdir()):
        run(["umount", str(_NETNS)], must_succeed=False)  # iproute2 binds it to itself
        with contextlib.suppress(OSError):  # somebody was faster, and uses it
            _NETNS.rmdir()
    mark.unlink()


def leftovers() -> list[str]:
    """The namespaces of the lab and of its daemon that exist, of this run or of a killed one."""
    if not _NETNS.is_dir():
        return []
    return sorted(
        entry.name for entry in _NETNS.iterdir() if entry.name.startswith((PREFIX, DAEMON_PREFIX))
    )


def sweep(*, deadline_s: float = 15) -> int:
    """Removes every namespace of the lab with all that is in it, processes first.

    Returns:
        How many namespaces there were.

    Raises:
        CommandError: Something would not go in `deadline_s`.
    """
    names = leftovers()
    count = len(names)
    give_up_at = time.monotonic() + deadline_s
    while names:
        end_processes(names)
        for name in names:
            run(["ip", "netns", "delete", name], must_succeed=False)
        names = leftovers()
        if names and time.monotonic() > give_up_at:
            raise CommandError(f"namespaces that would not go: {' '.join(names)}")
    return count
