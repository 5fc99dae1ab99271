"""Very many records: a start with all of them in the store, and the controller's memory at rest."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Final
from uuid import UUID

import yaml

from bench.context import Bench
from bench.daemon import Daemon
from bench.figures import Bar, Row, judge, median
from bench.lab import guest, network_name
from bench.place import BenchError
from bench.procs import cpu_seconds, memory, wait_until
from bench.records import instance, network
from imdsproxy.model.entities import METADATA_IPV4, METADATA_PORT, Instance, Network
from imdsproxy.model.records import parse_instance, parse_network
from imdsproxy.sources.sqlite.store import Store

__all__ = ["ROWS", "measure_many"]

ROWS: Final = ("many-start", "many-store", "many-file")
_START_BAR: Final = Bar("≤ 15 s", at_most=15.0)
_MEMORY_BAR: Final = Bar("≤ 250 MB", at_most=250.0)
_PATIENCE_S: Final = 600.0
_REST_S: Final = 30.0
_AT_ONCE: Final = 20_000
_ANSWER_S: Final = 60.0
_REQUEST: Final = b"GET /latest/meta-data/instance-id HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n"
_GOOD: Final = b"HTTP/1.1 200 "
_HEAD: Final = 4096


def measure_many(bench: Bench, wanted: Callable[[str], bool]) -> Iterator[Row]:
    """Measure all rows."""
    bench.say(f"{bench.scale.many_networks:,} networks")
    # Each network has one listener, not two: HAProxy then needs 10,000 descriptors, and some hosts allow only 20,000.
    bench.lab.grow(bench.scale.many_networks, ipv6=False)
    if wanted("many-start") or wanted("many-store"):
        yield from _of_store(bench, wanted)
    if wanted("many-file"):
        yield _of_file(bench)


def _records(
    bench: Bench, count: int
) -> tuple[list[dict[str, object]], Iterator[dict[str, object]]]:
    """Return networks and instances, spread over the networks; each network's first instance sends the requests."""
    names = [network_name(number) for number in range(bench.scale.many_networks)]
    networks = [{**network(name), "mac_check": False} for name in names]
    return networks, (_instance(names, number) for number in range(count))


def _instance(names: Sequence[str], number: int) -> dict[str, object]:
    place, turn = names[number % len(names)], number // len(names)
    mac = f"fa:16:{number.to_bytes(4, 'big').hex(':')}"
    ports = [{"network": place, "mac": mac, "addresses": [guest(turn)]}]
    record = instance(str(UUID(int=number)), with_user_data=False)
    return {**record, "name": f"many-{number}", "ports": ports}


def _of_store(bench: Bench, wanted: Callable[[str], bool]) -> Iterator[Row]:
    daemon = Daemon(bench.directory / "many")
    bench.say(f"{bench.scale.many:,} instances in the store")
    _fill(bench, daemon)
    try:
        bench.say("the first start, which compiles all of them")
        daemon.start(_PATIENCE_S)
        daemon.wait_serving(bench.scale.many_networks, _PATIENCE_S)
        if wanted("many-start"):
            yield _start_row(bench, [_start(bench, daemon) for _ in range(bench.scale.starts)])
        if wanted("many-store"):
            daemon.stop()
            daemon.start(_PATIENCE_S)
            yield _at_rest(bench, daemon, "many-store", "the store", bench.scale.many)
    finally:
        daemon.stop()


def _fill(bench: Bench, daemon: Daemon) -> None:
    networks, instances = _records(bench, bench.scale.many)
    store = Store(daemon.directory / "state" / "store.sqlite")
    with contextlib.closing(store):
        store.put([one for one in map(parse_network, networks) if isinstance(one, Network)], ())
        parsed = (one for one in map(parse_instance, instances) if isinstance(one, Instance))
        while part := tuple(islice(parsed, _AT_ONCE)):
            store.put((), part)


@dataclass(frozen=True, slots=True)
class _Started:
    """A start: seconds until the last network answered, and the controller's processor time and memory."""

    seconds: float
    processor_s: float
    peak_mb: float


def _start(bench: Bench, daemon: Daemon) -> _Started:
    daemon.stop()
    daemon.empty_runtime()
    bench.say("a start")
    seconds = timed_start(bench, daemon, bench.scale.many_networks)
    daemon.wait_ready(_PATIENCE_S)
    controller = daemon.processes().controller
    return _Started(seconds, cpu_seconds(controller), _peak(controller))


def _start_row(bench: Bench, starts: Sequence[_Started]) -> Row:
    last = [one.seconds for one in starts]
    processor_s = median([one.processor_s for one in starts])
    return Row(
        key="many-start",
        what=(
            f"`imdsproxy run` with {bench.scale.many:,} instances in {bench.scale.many_networks:,} networks in its "
            "store: until the last network answers"
        ),
        figure=(
            f"{median(last):.1f} s ({min(last):.1f} to {max(last):.1f}); processor time of the controller until it "
            f"is ready {processor_s:.1f} s; at most {max(one.peak_mb for one in starts):.0f} MB"
        ),
        verdict=judge(median(last), _START_BAR),
        bar=_START_BAR.text,
        value=median(last),
        how=(
            f"median of {len(last)} starts as after a reboot, with an empty runtime directory; each instance has a "
            "MAC, an address and a key; a listener each network, IPv4"
        ),
        data={"starts": [asdict(one) for one in starts]},
    )


def timed_start(bench: Bench, daemon: Daemon, count: int) -> float:
    """Return the seconds from `imdsproxy run` until a guest in each network has its answer.

    The sockets are created before, because a socket in another namespace takes longer than a request.

    Raises:
        BenchError: Some networks do not answer.
    """
    names = [network_name(number) for number in range(count)]
    sockets = [bench.lab.socket(name) for name in names]
    try:
        for one in sockets:
            one.settimeout(_ANSWER_S)
            one.bind((guest(0), 0))
        began = time.perf_counter()
        daemon.spawn()
        statuses = set()
        for one in sockets:
            daemon.timed(partial(_connects, one), _PATIENCE_S, "a start")
            one.sendall(_REQUEST)
            statuses.add(one.recv(_HEAD)[: len(_GOOD)])
            # HAProxy allows fewer connections than there are networks.
            one.close()
        took = time.perf_counter() - began
    finally:
        for one in sockets:
            one.close()
    if statuses != {_GOOD}:
        raise BenchError(f"answers after a start: {statuses}")
    return took


def _connects(one: socket.socket) -> bool:
    return one.connect_ex((str(METADATA_IPV4), METADATA_PORT)) == 0


def _of_file(bench: Bench) -> Row:
    count = bench.scale.many // 2
    records = bench.directory / "many-records"
    records.mkdir()
    settings = {"file": {"enabled": True, "directory": str(records)}}
    daemon = Daemon(bench.directory / "many-file", {"sources": settings})
    bench.say(f"{count:,} instances in record files")
    networks, instances = _records(bench, count)
    with (records / "many.yaml").open("w") as file:
        yaml.dump({"networks": networks}, file, Dumper=yaml.CSafeDumper)
        file.write("instances:\n")
        while part := list(islice(instances, _AT_ONCE)):
            yaml.dump(part, file, Dumper=yaml.CSafeDumper)
    try:
        daemon.start(_PATIENCE_S)
        wait_until(lambda: daemon.status()["instances"] == count, _PATIENCE_S, every_s=1)
        daemon.wait_serving(len(networks), _PATIENCE_S)
        return _at_rest(bench, daemon, "many-file", "record files", count)
    finally:
        daemon.stop()


def _at_rest(bench: Bench, daemon: Daemon, key: str, where: str, count: int) -> Row:
    controller = daemon.wait_settled().controller
    _wait_for_rest(bench, controller)
    value = memory([controller]).rss / 1e6
    return Row(
        key=key,
        what=(
            f"the controller at rest with {count:,} instances in {bench.scale.many_networks:,} networks from {where}"
        ),
        figure=f"{value:.0f} MB (at most {_peak(controller):.0f} MB since it started)",
        verdict=judge(value, _MEMORY_BAR),
        bar=_MEMORY_BAR.text,
        value=value,
        how="RSS once it uses less than a tenth of a processor",
        data={"rss_mb": value, "peak_mb": _peak(controller)},
    )


def _wait_for_rest(bench: Bench, controller: int) -> None:
    def rests() -> bool:
        before = cpu_seconds(controller)
        time.sleep(bench.scale.settle_s)
        return cpu_seconds(controller) - before < bench.scale.settle_s / 10

    wait_until(rests, _REST_S)


def _peak(pid: int) -> float:
    """Return the peak memory of a process, in MB (proc_pid_status(5), VmHWM)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(one.split()[1]) / 1000 for one in lines if one.startswith("VmHWM:"))
