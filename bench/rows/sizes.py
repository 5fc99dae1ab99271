"""Needs of a host by its number of guests: memory by process, processor time at rest and for a boot, disk space."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from bench.context import Bench
from bench.daemon import Daemon, Processes
from bench.figures import Row, Verdict
from bench.guest import Guest
from bench.lab import guest, network_name
from bench.place import BenchError
from bench.procs import cpu_seconds, memory
from bench.records import instance, network

__all__ = ["ROWS", "measure_sizes"]

_GUESTS: Final = {"size-10": 10, "size-100": 100, "size-1000": 1_000, "size-10000": 10_000}
ROWS: Final = tuple(_GUESTS)
_EACH: Final = 10
"""Guests in a network."""

_BOOTS: Final = 200
_BATCH: Final = 1_000
_PATIENCE_S: Final = 120.0
_OK: Final = 200
_BESIDE: Final = (
    "/latest/user-data",
    "/openstack",
    "/openstack/latest/meta_data.json",
    "/openstack/latest/user_data",
)
"""Documents that a boot reads beside EC2's tree."""


def measure_sizes(bench: Bench, wanted: Callable[[str], bool]) -> Iterator[Row]:
    """Measure a row for each number of guests."""
    for key, guests in _GUESTS.items():
        if wanted(key):
            yield _size(bench, key, min(guests, bench.scale.instances))


def _size(bench: Bench, key: str, guests: int) -> Row:
    networks = max(1, guests // _EACH)
    bench.say(f"{guests:,} guests in {networks:,} networks")
    bench.lab.grow(networks)
    daemon = Daemon(bench.directory / key)
    try:
        daemon.start()
        _fill(daemon, guests, networks)
        # The restart, as after a reboot of the host, excludes the memory that adding the guests took.
        daemon.stop()
        daemon.start(_PATIENCE_S)
        daemon.wait_serving(networks, _PATIENCE_S)
        processes = daemon.wait_settled()
        time.sleep(bench.scale.settle_s)
        requests, boot_s = _boots(bench, processes, min(guests, _BOOTS), networks)
        rest = _percent(processes, bench.scale.idle_s / 3)
        sizes = {
            "controller": memory([processes.controller]).pss,
            "HAProxy": memory(processes.haproxy).pss,
            "document server": memory(processes.documents).pss,
        }
        disk = sum(
            one.stat().st_blocks * 512
            for one in (daemon.directory / "state").rglob("*")
            if one.is_file()
        )
    finally:
        daemon.stop()
    total = sum(sizes.values()) / 1e6
    each = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in sizes.items())
    return Row(
        key=key,
        what=f"what {guests:,} guests in {networks:,} networks need",
        figure=(
            f"{total:.0f} MB ({each}); {rest:.1f} % of a processor at rest; {boot_s * 1e3:.0f} ms of processor "
            f"time for a boot of {requests} requests; {disk / 1e6:.1f} MB on the disk"
        ),
        verdict=Verdict.SHOWN,
        value=total,
        how=(
            f"PSS after a start with them and {min(guests, _BOOTS)} boots, each of which reads all of EC2's tree and "
            "OpenStack's documents, 4 KiB of user-data among them; processor time of all processes"
        ),
        data={
            "pss_bytes": sizes,
            "rest_percent": rest,
            "boot_processor_s": boot_s,
            "boot_requests": requests,
            "disk_bytes": disk,
        },
    )


def _fill(daemon: Daemon, guests: int, networks: int) -> None:
    names = [network_name(number) for number in range(networks)]
    for start in range(0, networks, _BATCH):
        daemon.put(networks=[network(name) for name in names[start : start + _BATCH]])
    for start in range(0, guests, _BATCH):
        daemon.put(
            instances=[
                instance(
                    f"size-{number}", {names[number % networks]: [guest(1 + number // networks)]}
                )
                for number in range(start, min(start + _BATCH, guests))
            ]
        )


def _boots(bench: Bench, processes: Processes, count: int, networks: int) -> tuple[int, float]:
    """Boot this many guests one after the other; return the requests and the processor time of one boot."""
    before = _spent(processes)
    requests = sum(_boot(bench, number, networks) for number in range(count))
    return requests // count, (_spent(processes) - before) / count


def _boot(bench: Bench, number: int, networks: int) -> int:
    one = Guest(bench.lab, network_name(number % networks), guest(1 + number // networks))
    waiting, asked = ["/latest/meta-data/", *_BESIDE], 0
    try:
        while waiting:
            path = waiting.pop()
            answer = one.get(path)
            asked += 1
            if answer.status != _OK:
                raise BenchError(f"a boot's {path} was answered {answer.status}")
            if path.endswith("/"):
                waiting += [path + entry for entry in _entries(answer.body.decode().splitlines())]
    finally:
        one.close()
    return asked


def _entries(lines: Sequence[str]) -> Iterator[str]:
    """Yield the names in a listing of EC2's tree; a key is listed as `0=NAME`."""
    for line in lines:
        number, equals, _ = line.partition("=")
        yield f"{number}/" if equals else line


def _percent(processes: Processes, seconds: float) -> float:
    before, began = _spent(processes), time.perf_counter()
    time.sleep(seconds)
    return (_spent(processes) - before) / (time.perf_counter() - began) * 100


def _spent(processes: Processes) -> float:
    return sum(cpu_seconds(pid) for pid in processes.everything)
