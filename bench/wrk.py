"""wrk, run in a network, and its report."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.place import BenchError

__all__ = ["Load", "WrkReport", "parse_wrk", "run_wrk", "wrk_command"]

_DONE: Final = re.compile(r"^\s*(\d+) requests in ([\d.]+)(ms|s|m),", re.MULTILINE)
_LATENCY: Final = re.compile(r"^\s*(50|99)%\s+([\d.]+)(us|ms|s)", re.MULTILINE)
_ERRORS: Final = re.compile(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)")
_REFUSED: Final = re.compile(r"Non-2xx or 3xx responses: (\d+)")
_SECONDS: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}


@dataclass(frozen=True, slots=True)
class WrkReport:
    """Report of wrk.

    Attributes:
        errors: Socket errors of all kinds, and answers that were neither 2xx nor 3xx.
        p50_s: Median latency.
    """

    requests: int
    seconds: float
    errors: int
    p50_s: float
    p99_s: float

    @property
    def rate(self) -> float:
        """Requests a second."""
        return self.requests / self.seconds


@dataclass(frozen=True, slots=True)
class Load:
    """Kept connections, each with one request after the other.

    Attributes:
        cpu: The processor on which wrk runs; `None` for any.
        script: A Lua script that changes the requests.
    """

    connections: int = 64
    seconds: float = 3
    cpu: int | None = None
    headers: tuple[str, ...] = ()
    script: Path | None = None


def parse_wrk(text: str) -> WrkReport | None:
    """Parse the report of wrk with `--latency`; `None` if the text is not a report."""
    done = _DONE.search(text)
    if done is None:
        return None
    latency = {match[1]: float(match[2]) * _SECONDS[match[3]] for match in _LATENCY.finditer(text)}
    errors, refused = _ERRORS.search(text), _REFUSED.search(text)
    return WrkReport(
        requests=int(done[1]),
        seconds=float(done[2]) * _SECONDS[done[3]],
        errors=sum(map(int, errors.groups() if errors else ())) + int(refused[1] if refused else 0),
        p50_s=latency.get("50", 0.0),
        p99_s=latency.get("99", 0.0),
    )


def wrk_command(namespace: str, url: str, load: Load) -> list[str]:
    """Return the argv: one thread, in the namespace, on the processor."""
    argv = ["nsenter", f"--net=/run/netns/{namespace}", "--"]
    if load.cpu is not None:
        argv += ["taskset", "-c", str(load.cpu)]
    if load.seconds < 1:
        # wrk takes only whole seconds, but prints its report when it is interrupted.
        argv += ["timeout", "--signal=INT", f"{load.seconds:g}"]
    argv += [
        "wrk",
        "-t1",
        f"-c{load.connections}",
        f"-d{max(1, round(load.seconds))}s",
        "--latency",
    ]
    for header in load.headers:
        argv += ["-H", header]
    if load.script is not None:
        argv += ["-s", str(load.script)]
    return [*argv, url]


def run_wrk(namespace: str, url: str, load: Load, *, wrap: Sequence[str] = ()) -> WrkReport:
    """Run wrk to its end.

    Raises:
        BenchError: wrk gave no report.
    """
    done = subprocess.run(
        [*wrap, *wrk_command(namespace, url, load)],
        capture_output=True,
        text=True,
        timeout=load.seconds + 30,
        check=False,
    )
    report = parse_wrk(done.stdout)
    if report is None:
        raise BenchError(f"wrk gave no report: {done.stdout} {done.stderr}")
    return report
