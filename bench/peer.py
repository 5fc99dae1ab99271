"""Neutron's own metadata agents, measured by an external harness in a given directory.

The directory has a `run.sh` that takes the options below and writes its results as JSON. No code of the harness is
imported, and the harness is only needed for figures beside Neutron's.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.place import BenchError

__all__ = [
    "AGENT",
    "OVN",
    "PORTS",
    "Peer",
    "PeerBurst",
    "PeerScale",
    "parse_burst",
    "parse_load",
    "parse_scale",
    "parse_slow",
    "parse_southbound",
    "peer_at",
    "running",
]

AGENT: Final = "ovs_w2_bl"
"""neutron-metadata-agent with two workers and a repaired listen backlog: its best case."""

OVN: Final = "ovn_w0_bl"
"""The OVN agent with its default number of workers and a repaired listen backlog: its best case."""

AS_SHIPPED: Final = ("ovs_w1", "ovn_default")
PORTS: Final = 1000

_PATIENCE_S: Final = 3600.0
_END_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Peer:
    """The harness.

    Attributes:
        directory: Directory with `run.sh`.
        out: Directory for results.
    """

    directory: Path
    out: Path
    say: Callable[[str], None]

    def run(self, options: Sequence[str]) -> Mapping[str, object]:
        """Run some parts of the harness; return all results.

        Raises:
            BenchError: The harness failed.
        """
        result = self.out / "peer.json"
        result.unlink(missing_ok=True)
        log = self.out / "peer.log"
        argv = ["bash", str(self.directory / "run.sh"), *options, "--out", str(result)]
        with log.open("ab") as output, running(argv, output.fileno()) as process:
            try:
                status = process.wait(_PATIENCE_S)
            except subprocess.TimeoutExpired:
                raise BenchError("the peer's harness does not end") from None
        if status != 0 or not result.exists():
            words = log.read_text(errors="replace").splitlines()[-3:]
            raise BenchError(f"the peer's harness failed ({status}): {' / '.join(words)}")
        found: Mapping[str, object] = json.loads(result.read_text())
        return found

    def load(self, seconds: float, bursts: int) -> Mapping[str, object]:
        """Measure both agents: load, a crowd of 256, a Nova that takes 20 ms, a Southbound database of 1,000 ports."""
        best = f"{AGENT},{OVN}"
        return self.run(
            [
                *("--skip", "correctness,scale", "--runs", "1", "--conns", "64"),
                *("--seconds", str(max(1, round(seconds))), "--calm-wait", "1"),
                *("--variants", best, "--slow-variants", best),
                *("--burst-variants", ",".join((*AS_SHIPPED, AGENT, OVN)), "--bursts", "256"),
                *("--burst-runs", str(bursts), "--sb-ports-list", str(PORTS)),
            ]
        )

    def scale(self, networks: Sequence[int], runs: int) -> Mapping[str, object]:
        """Measure a proxy for each of this many networks: memory, and whole restarts."""
        return self.run(
            [
                *("--skip", "correctness,load,real,burst,slow", "--calm-wait", "1"),
                *("--scale", ",".join(map(str, networks)), "--scale-runs", str(runs)),
            ]
        )


@contextlib.contextmanager
def running(argv: Sequence[str], output: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process group; at the end of the context ask it to end, so that it cleans up after itself."""
    process = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_S)


def peer_at(directory: Path, out: Path, say: Callable[[str], None]) -> Peer:
    """Return the harness in a directory.

    Raises:
        BenchError: The directory has no harness.
    """
    if not (directory / "run.sh").is_file():
        raise BenchError(f"{directory} has no run.sh: it is no peer's harness")
    return Peer(directory.resolve(), out, say)


def _at(found: object, *path: str) -> object:
    for key in path:
        if not isinstance(found, dict) or key not in found:
            raise BenchError(f"the peer's result has no {'.'.join(path)}")
        found = found[key]
    return found


def _number(found: object, *path: str) -> float:
    value = _at(found, *path)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BenchError(f"the peer's result has no number at {'.'.join(path)}")
    return float(value)


def parse_load(found: object, variant: str) -> float:
    """Return the requests a second that a variant answered 2xx, on 64 kept connections."""
    return _number(found, "load", "cells", variant, "keepalive_c64", "ok_rps")


def parse_slow(found: object, variant: str) -> float:
    """Return the requests a second that a variant answered 2xx, with a Nova that takes 20 ms."""
    return _number(found, "slow_nova", "cells", variant, "keepalive_c64", "ok_rps")


def parse_southbound(found: object) -> float:
    """Return the requests a second of the unmodified OVN agent with a Southbound database of `PORTS` ports.

    Measured on one connection, which loses no request; the agent serves one request at a time on any number of
    connections.
    """
    return _number(found, "ovn_real_ports", str(PORTS), "ok_rps")


@dataclass(frozen=True, slots=True)
class PeerBurst:
    """Shares of 256 guests that were answered 200, by variant."""

    shares: Mapping[str, float]


def parse_burst(found: object) -> PeerBurst:
    """Return the shares of 256 guests that were answered when all asked at once."""
    variants = (*AS_SHIPPED, AGENT, OVN)
    return PeerBurst({one: _number(found, "burst", one, "n256", "ok_share") for one in variants})


@dataclass(frozen=True, slots=True)
class PeerScale:
    """This many networks with a proxy each.

    Attributes:
        pss: Bytes of the agent and all proxies.
        whole_s: Seconds to end and start agent and proxies until all answer, with the fastest way to start them.
        whole_by_driver_s: The same by Neutron's own driver: its restart of all proxies, and the restart of the agent
            alone.
        proxies_s: Seconds from the start of the proxies alone, with the fastest way.
    """

    pss: int
    whole_s: float
    whole_by_driver_s: float
    proxies_s: float


def parse_scale(found: object, networks: int) -> PeerScale:
    """Return the cost of this many networks."""
    place = ("scale", str(networks))
    ways = ("raw_spawn_width1", "raw_spawn_width2")
    kilobytes = _number(found, *place, "memory", "pss_kb_sum")
    kilobytes += _number(found, *place, "agent_mem", "pss_kb")
    driver = _number(found, *place, "neutron_driver", "restart_to_all_200_s")
    return PeerScale(
        pss=round(kilobytes * 1024),
        whole_s=min(_number(found, *place, way, "whole_restart_to_all_200_s") for way in ways),
        whole_by_driver_s=driver + _number(found, *place, "agent_only_restart_to_200_s"),
        proxies_s=min(_number(found, *place, way, "spawn_to_all_200_s") for way in ways),
    )
