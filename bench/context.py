"""Shared context of the rows: the directory, the networks, the daemon, and the scale of the measurements."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.daemon import Daemon
from bench.lab import Lab, network_name
from bench.records import first_guest, network

__all__ = ["HAPROXY", "Bench", "Scale"]

HAPROXY: Final = "/usr/sbin/haproxy"


@dataclass(frozen=True, slots=True)
class Scale:
    """Scale of the measurements: the full one, a rough one, or the smallest that exercises each row.

    Attributes:
        flood_s: Seconds that a guest reads while another network is flooded.
        many: Instances of the rows about very many records; half as many in files.
        settle_s: Seconds to wait before memory and idle time are read.
        replacing: Numbers of networks in front of Nova.
        ovn_ports: Numbers of ports of an OVN cloud, the smallest first.
        ovn_local: Ports that are on the host.
        ovn_events: Number of changes of a port.
        fleet_hosts: Simulated hosts of a fleet.
        fleet_real: Complete hosts of a fleet.
        fleet_instances: Instances on each simulated host.
        fleet_changes: Number of changes that reach one host each.
        fleet_policies: Number of changes that reach all hosts.
        warm_up: Load each side once before its rounds.
    """

    networks: int
    rounds: int
    seconds: float
    adds: int
    network_adds: int
    moves: int
    reloads: int
    kills: int
    instances: int
    records: int
    idle_s: float
    starts: int
    processes: int
    peer_rounds: int
    flood_s: float
    many: int = 200_000
    many_networks: int = 5_000
    settle_s: float = 2
    replacing: tuple[int, ...] = (100, 500)
    ovn_ports: tuple[int, ...] = (1_000, 10_000, 20_000)
    ovn_local: int = 200
    ovn_events: int = 300
    fleet_hosts: int = 10_000
    fleet_real: int = 3
    fleet_instances: int = 10
    fleet_changes: int = 300
    fleet_policies: int = 5
    warm_up: bool = True

    @staticmethod
    def of(*, quick: bool = False, smallest: bool = False) -> Scale:
        """Return the full, the quick or the smallest scale."""
        if smallest:
            return Scale(
                networks=10,
                rounds=1,
                seconds=0.2,
                adds=4,
                network_adds=2,
                moves=20,
                reloads=2,
                kills=1,
                instances=20,
                records=40,
                idle_s=0.3,
                starts=1,
                processes=2,
                peer_rounds=1,
                flood_s=0.3,
                many=40,
                many_networks=4,
                settle_s=0.1,
                replacing=(1, 2),
                ovn_ports=(60,),
                ovn_local=2,
                ovn_events=4,
                fleet_hosts=20,
                fleet_real=1,
                fleet_instances=2,
                fleet_changes=3,
                fleet_policies=1,
                warm_up=False,
            )
        if quick:
            return Scale(
                networks=200,
                rounds=2,
                seconds=1,
                adds=50,
                network_adds=10,
                moves=100,
                reloads=10,
                kills=3,
                instances=2_000,
                records=20_000,
                idle_s=5,
                starts=1,
                processes=10,
                peer_rounds=1,
                flood_s=3,
                many=20_000,
                many_networks=500,
                ovn_ports=(1_000,),
                ovn_local=40,
                ovn_events=50,
                fleet_hosts=1_000,
                fleet_changes=100,
                fleet_policies=3,
            )
        return Scale(
            networks=1_000,
            rounds=5,
            seconds=2,
            adds=300,
            network_adds=100,
            moves=1_000,
            reloads=100,
            kills=5,
            instances=10_000,
            records=200_000,
            idle_s=30,
            starts=3,
            processes=50,
            peer_rounds=3,
            flood_s=6,
        )


@dataclass(slots=True)
class Bench:
    """Context that every row gets."""

    directory: Path
    lab: Lab
    scale: Scale
    say: Callable[[str], None]
    binary: str = HAPROXY

    @property
    def cpus(self) -> tuple[int, int]:
        """The processor for HAProxy and the processor for the load."""
        usable = sorted(os.sched_getaffinity(0))
        return usable[0], usable[-1]

    def network(self, name: str) -> dict[str, object]:
        """Return the record of a network of the lab."""
        return network(name)

    def fleet(self, daemon: Daemon, count: int) -> None:
        """Store the first `count` networks in a daemon, each with its first guest, and wait until all are served."""
        names = [network_name(number) for number in range(count)]
        daemon.put(
            [self.network(name) for name in names],
            [first_guest(name, with_user_data=False) for name in names],
        )
        daemon.wait_serving(count)
