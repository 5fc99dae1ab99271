"""The bare HAProxy with which figures are compared: no maps, no rules, no cache."""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.place import BenchError
from bench.procs import end_all, wait_until

__all__ = ["Bare", "answering", "forwarding", "render_bare", "run_bare", "worker_limits"]


_START_S: Final = 20.0
_EARLY_END_S: Final = 0.2


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits that both sides of a comparison share: threads, connections in all and of one bind."""

    nbthread: int
    maxconn: int
    maxconn_of_bind: int


@dataclass(frozen=True, slots=True)
class Bare:
    """A running bare HAProxy; `config` is its configuration with long bodies shortened."""

    pid: int
    config: str


def worker_limits(config: str) -> Limits:
    """Return the limits in a configuration from imdsproxy.

    Raises:
        BenchError: The configuration has no such limits.
    """
    found: dict[str, int] = {}
    for line in config.splitlines():
        words = line.split()
        if len(words) == 2 and words[0] in {"nbthread", "maxconn"}:  # noqa: PLR2004 - key, value
            found.setdefault(words[0], int(words[1]))
        elif words[:1] == ["bind"] and "maxconn" in words:
            found.setdefault("bind", int(words[words.index("maxconn") + 1]))
    try:
        return Limits(found["nbthread"], found["maxconn"], found["bind"])
    except KeyError as error:
        raise BenchError(f"no {error} in HAProxy's configuration") from error


def answering(body_bytes: int, content_type: str = "text/plain; charset=utf-8") -> tuple[str, ...]:
    """Return the rules of a HAProxy that answers by itself."""
    return (
        f'http-request return status 200 content-type "{content_type}" string {"x" * body_bytes}',
    )


def forwarding(server: str, headers: Sequence[tuple[str, str]] = ()) -> tuple[str, ...]:
    """Return the rules of a HAProxy that forwards over kept connections, adding these headers."""
    return (
        *(f"http-request set-header {name} {value}" for name, value in headers),
        "http-reuse always",
        f"server upstream {server}",
    )


def render_bare(limits: Limits, binds: Sequence[str], rules: Sequence[str]) -> str:
    """Render the configuration, with imdsproxy's timeouts and keep-alive."""
    listening = [f"bind {bind} proto h1 maxconn {limits.maxconn_of_bind}" for bind in binds]
    lines = [
        "global",
        f"  nbthread {limits.nbthread}",
        f"  maxconn {limits.maxconn}",
        "defaults",
        "  mode http",
        "  timeout connect 2s",
        "  timeout client 30s",
        "  timeout server 30s",
        "  timeout http-request 10s",
        "  timeout http-keep-alive 15s",
        "  option idle-close-on-response",
        "listen bare",
        *(f"  {line}" for line in (*listening, *rules)),
    ]
    return "\n".join(lines) + "\n"


def _sockets(pid: int) -> int:
    descriptors = Path(f"/proc/{pid}/fd")
    try:
        return sum(one.readlink().name.startswith("socket:") for one in descriptors.iterdir())
    except FileNotFoundError:
        return 0  # the process has ended, or a descriptor was just closed: the caller looks again


def _shorten(body: re.Match[str]) -> str:
    return f"xxx[{len(body[0])} bytes]"


@contextlib.contextmanager
def run_bare(binary: str, directory: Path, name: str, config: str) -> Iterator[Bare]:
    """Run a bare HAProxy for the time of the context.

    Raises:
        BenchError: HAProxy does not start.
    """
    path = directory / f"{name}.cfg"
    path.write_text(config)
    check = subprocess.run(
        [binary, "-c", "-f", str(path)], capture_output=True, text=True, check=False
    )
    if check.returncode != 0:
        raise BenchError(f"HAProxy refuses the baseline {name}: {check.stderr}")
    process = subprocess.Popen(
        [binary, "-db", "-f", str(path)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    binds = config.count("\n  bind ")
    try:
        if not wait_until(
            lambda: process.poll() is not None or _sockets(process.pid) >= binds, _START_S
        ):
            raise BenchError(f"the baseline {name} does not listen after {_START_S:.0f} s")
        wait_until(lambda: process.poll() is not None, _EARLY_END_S)
        if process.poll() is not None:
            raise BenchError(f"the baseline {name} ended at once")
        yield Bare(process.pid, re.sub("x{40,}", _shorten, config))
    finally:
        end_all([process.pid])
        process.wait()
