"""Very many records: a start with all of them in the store, and what the controller needs at rest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Final
from uuid import UUID

import yaml

from bench.context import Bench
from bench.daemon import Daemon
from bench.figures import Bar, Row, judge, median
from bench.lab import guest, network_name
from bench.procs import cpu_seconds, memory, wait_until
from bench.records import instance, network
from bench.rows.growth import timed_start
from imdsproxy.core.model import Instance, Network
from imdsproxy.core.records import parse_instance, parse_network
from imdsproxy.sources.sqlite_store import Store

__all__ = ["ROWS", "measure_many"]

ROWS: Final = ("many-start", "many-store", "many-file")
_START_BAR: Final = Bar("≤ 15 s", at_most=15.0)
_MEMORY_BAR: Final = Bar("≤ 250 MB", at_most=250.0)
_PATIENCE_S: Final = 600.0
_REST_S: Final = 30.0
_AT_ONCE: Final = 20_000


def measure_many(bench: Bench, wanted: Callable[[str], bool]) -> Iterator[Row]:
    """All rows."""
    bench.say(f"{bench.scale.many_networks:,} networks")
    # A listener each, not two: HAProxy needs 10,000 descriptors for so many networks, and some hosts give it 20,000.
    bench.lab.grow(bench.scale.many_networks, ipv6=False)
    if wanted("many-start") or wanted("many-store"):
        yield from _of_store(bench, wanted)
    if wanted("many-file"):
        yield _of_file(bench)


def _records(bench: Bench, count: int) -> tuple[list[dict[str, object]], Iterator[dict[str, object]]]:
    """Networks, and as many instances in turn; the first one of each network is who asks."""
    names = [network_name(number) for number in range(bench.scale.many_networks)]
    networks = [{**network(name), "mac_check": False} for name in names]
    instances = (_instance(names[number % len(names)], number, len(names)) for number in range(count))
    return networks, instances


def _instance(name: str, number: int, networks: int) -> dict[str, object]:
    record = instance(str(UUID(int=number)), {name: [guest(number // networks)]}, with_user_data=False)
    mac = f"fa:16:{number.to_bytes(4, 'big').hex(':')}"
    return {**record, "name": f"many-{number}", "ports": [{**port, "mac": mac} for port in record["ports"]]}


def _of_store(bench: Bench, wanted: Callable[[str], bool]) -> Iterator[Row]:
    count = bench.scale.many
    daemon = Daemon(bench.directory / "many")
    bench.say(f"{count:,} instances in the store")
    networks, instances = _records(bench, count)
    store = Store(daemon.directory / "state" / "store.sqlite")
    parsed = (one for one in map(parse_instance, instances) if isinstance(one, Instance))
    store.put([one for one in map(parse_network, networks) if isinstance(one, Network)], ())
    while part := tuple(islice(parsed, _AT_ONCE)):
        store.put((), part)
    store.close()
    try:
        bench.say("the first start, which compiles all of them")
        daemon.start(_PATIENCE_S)
        daemon.wait_serving(len(networks), _PATIENCE_S)
        starts, spent, peaks = [], [], []
        for _ in range(bench.scale.starts):
            daemon.stop()
            bench.say("a start")
            starts.append(timed_start(bench, daemon, len(networks), _PATIENCE_S))
            daemon.wait_ready(_PATIENCE_S)
            controller = daemon.processes().controller
            spent.append(cpu_seconds(controller))
            peaks.append(_peak(controller))
        last = [one for _, one in starts]
        if wanted("many-start"):
            yield Row(
                key="many-start",
                what=f"`imdsproxy run` with {count:,} instances in {len(networks):,} networks: until the last one answers",
                figure=(
                    f"{median(last):.1f} s ({min(last):.1f} to {max(last):.1f}; processor time of the controller "
                    f"until it is ready {median(spent):.1f} s; at most {median(peaks):.0f} MB)"
                ),
                verdict=judge(median(last), _START_BAR),
                bar=_START_BAR.text,
                value=median(last),
                how=f"median of {len(last)} cold starts of all three processes; each instance has a MAC, an address and a key",
                data={"last_answer_s": last, "processor_s": spent, "peak_mb": peaks},
            )
        if wanted("many-store"):
            yield _at_rest(bench, daemon, "many-store", "the store", count)
    finally:
        daemon.stop()


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
        what=f"the controller at rest with {count:,} instances in {bench.scale.many_networks:,} networks from {where}",
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
    """The most memory that a process has had, in MB (proc_pid_status(5), VmHWM)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(one.split()[1]) / 1000 for one in lines if one.startswith("VmHWM:"))
