"""The first request of a guest that only Neutron knows: through the resolver, a look-up, and Nova."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from typing import Final

from bench.context import Bench
from bench.figures import Row, judge, median, percentile
from bench.front import in_front
from bench.guest import Guest
from bench.lab import PLUGGED, network_name
from bench.neutron import DELAY_MS, neutron_settings, plug_stranger, port_name, run_neutron
from bench.nova import PATH, identity, run_stub
from bench.place import BenchError

__all__ = ["measure_misses"]

_NETWORKS: Final = 10
_OK: Final = 200


def measure_misses(bench: Bench) -> Iterator[Row]:
    """Measure the row `nova-misses`."""
    with run_stub(bench.binary, bench.directory) as stub, run_neutron() as neutron:
        settings = neutron_settings(neutron)
        with in_front(bench, "misses", stub.port, _NETWORKS, settings):
            yield _misses(bench)


def _misses(bench: Bench) -> Row:
    first, second = [], []
    names = [network_name(number) for number in range(_NETWORKS)]
    guests = {name: plug_stranger(bench.lab, name) for name in names}
    for number in range(bench.scale.adds):
        name = names[number % _NETWORKS]
        address = PLUGGED.ip + 1 + number // _NETWORKS
        words = f"-n {guests[name]} address add {address}/{PLUGGED.network.prefixlen} dev eth0"
        subprocess.run(["/usr/sbin/ip", *words.split()], check=True)
        one = Guest(bench.lab, guests[name], str(address))
        first.append(_asked(one, name))
        second.append(_asked(one, name))
        one.close()
    return Row(
        key="nova-misses",
        what=f"first request of a guest that only Neutron knows, by a Neutron that takes {DELAY_MS} ms",
        figure=(
            f"p50 {median(first):.1f}, p99 {percentile(first, 99):.1f} ms; the next one "
            f"p50 {median(second):.2f}, p99 {percentile(second, 99):.2f} ms"
        ),
        verdict=judge(median(first), None),
        value=median(first),
        how=(
            f"{len(first)} addresses one after the other, in {_NETWORKS} networks, each on a connection of its own, by "
            "a guest behind a veth link, whose MAC counts; the look-up, the record in the map, the pair of address and "
            "MAC in the kernel, and the answer of a stand-in for Nova"
        ),
        data={"first_ms": first, "second_ms": second},
    )


def _asked(one: Guest, network: str) -> float:
    """Return the milliseconds until the guest was answered as itself."""
    began = time.perf_counter()
    answer = one.get(PATH)
    took = (time.perf_counter() - began) * 1000
    expected = identity(port_name(network, one.address)).instance
    if answer.status != _OK or json.loads(answer.body)["uuid"] != expected:
        raise BenchError(f"{network} {one.address}: {answer.status}, or another's document")
    return took
