"""Documents read over kept connections: repeated reads, first reads, and a document that is never cached."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bench.bare import Bare, Limits, answering, forwarding, render_bare, run_bare, worker_limits
from bench.context import Bench
from bench.daemon import Daemon
from bench.figures import Bar, Row, judge
from bench.guest import Broken, Guest
from bench.lab import network_name
from bench.place import BenchError
from bench.procs import pin
from bench.records import USER_DATA_BYTES, first_guest
from bench.sides import (
    Side,
    compare,
    load_in_turn,
    without_errors,
)

__all__ = ["measure_reads"]

_LEAF = "/latest/meta-data/instance-id"
_DATED_LEAF = "/2009-04-04/meta-data/instance-id"
"""Path that HAProxy keeps only in its cache, which `no-cache` bypasses, and not in its map of short documents."""
_USER_DATA = "/latest/user-data"
_META_DATA = "/openstack/latest/meta_data.json"
_BARE_PORT = 8080
_STUB_PORT = 8081
_FORWARD_PORT = 8082
_READS_BAR = Bar("≥ 0.85 x", at_least=0.85)
_NOT_CACHED = ("Cache-Control: no-cache",)


@dataclass(slots=True)
class _Stage:
    """One network, one guest, the daemon and the limits for bare HAProxys."""

    bench: Bench
    daemon: Daemon
    worker: int
    limits: Limits

    def url(self, path: str, port: int = 80) -> str:
        """Return a URL of the metadata address."""
        return f"http://169.254.169.254:{port}{path}"

    @contextlib.contextmanager
    def bare(self, name: str, port: int, rules: Sequence[str]) -> Iterator[Bare]:
        """Run a bare HAProxy in the network."""
        bind = f"169.254.169.254:{port} namespace {network_name(0)}"
        config = render_bare(self.limits, [bind], rules)
        with run_bare(self.bench.binary, self.bench.directory, name, config) as running:
            yield running


def measure_reads(bench: Bench, wanted: Callable[[str], bool]) -> Iterator[Row]:
    """Measure the rows `reads-leaf`, `reads-user-data`, `first-reads` and `meta-data`."""
    name = network_name(0)
    bench.lab.grow(1)
    daemon = Daemon(bench.directory / "reads")
    try:
        daemon.start()
        daemon.put([bench.network(name)], [first_guest(name)])
        daemon.wait_serving(1)
        worker = daemon.wait_settled().worker
        config = (daemon.runtime / "haproxy.cfg").read_text()
        stage = _Stage(bench, daemon, worker, worker_limits(config))
        sizes = _sizes(bench, name)
        if wanted("reads-leaf"):
            yield _repeated(stage, "reads-leaf", _LEAF, sizes[_LEAF])
        if wanted("reads-user-data"):
            yield _repeated(stage, "reads-user-data", _USER_DATA, sizes[_USER_DATA])
        if wanted("first-reads"):
            headers = _NOT_CACHED
            yield _through(stage, "first-reads", _DATED_LEAF, sizes[_LEAF], headers)
        if wanted("meta-data"):
            yield _through(stage, "meta-data", _META_DATA, sizes[_META_DATA], ())
    finally:
        daemon.stop()


def _sizes(bench: Bench, name: str) -> dict[str, int]:
    one = Guest(bench.lab, name)
    sizes = {}
    for path in (_LEAF, _USER_DATA, _META_DATA):
        try:
            answer = one.get(path)
        except Broken as broken:
            raise BenchError(f"{path}: {broken}") from broken
        if answer.status != 200:  # noqa: PLR2004 - HTTP's OK
            raise BenchError(f"{path}: {answer.status}")
        sizes[path] = len(answer.body)
    one.close()
    if sizes[_USER_DATA] != USER_DATA_BYTES:
        raise BenchError(f"user-data of {sizes[_USER_DATA]} bytes")
    return sizes


def _repeated(stage: _Stage, key: str, path: str, size: int) -> Row:
    with stage.bare(key, _BARE_PORT, answering(size)) as bare:
        ours = Side(stage.url(path), stage.worker)
        other = Side(stage.url("/", _BARE_PORT), bare.pid)
        load_in_turn(stage.bench, [other, ours], stage.bench.scale.seconds)
        without_errors(ours, other)
    return compare(
        key,
        ours,
        other,
        what=f"repeated reads of {path} ({size} bytes), keep-alive, 64 connections",
        how=(
            f"median of {len(ours.rates)} runs of {stage.bench.scale.seconds:g} s, in turn with a bare HAProxy "
            "that answers with `http-request return`; HAProxy on one processor, wrk on the other"
        ),
        bar=_READS_BAR,
        beside="bare",
        more={"bare_config": bare.config},
    )


def _through(stage: _Stage, key: str, path: str, size: int, headers: tuple[str, ...]) -> Row:
    """Measure reads that go to the document server, beside a bare HAProxy that forwards to a stub.

    The stub and wrk share a processor, and may be slower than the bare HAProxy. So the comparison is with the rate at
    which the processor time of a request would fill the bare HAProxy's processor.
    """
    with (
        stage.bare(f"{key}-stub", _STUB_PORT, answering(size)) as stub,
        stage.bare(
            f"{key}-forward",
            _FORWARD_PORT,
            forwarding(f"169.254.169.254:{_STUB_PORT} namespace {network_name(0)}"),
        ) as bare,
    ):
        pin(stub.pid, {stage.bench.cpus[1]})
        ours = Side(stage.url(path), stage.worker, headers)
        other = Side(stage.url("/", _FORWARD_PORT), bare.pid, headers)
        load_in_turn(stage.bench, [other, ours], min(1, stage.bench.scale.seconds))
        without_errors(ours, other)
    ratio = ours.rate * other.cost_us / 1e6
    what = "never-read documents" if headers else "meta_data.json, never cached"
    forced = ", every read is forced past the cache by `Cache-Control: no-cache`" if headers else ""
    return Row(
        key=key,
        what=f"{what}, through the document server ({size} bytes), keep-alive, 64 connections",
        figure=(
            f"{ours.rate:,.0f} requests/s, {ratio:.2f} x what a bare HAProxy forwards to a stub at most "
            f"({other.cost_us:.1f} µs of its processor a request; measured {other.rate:,.0f} requests/s)"
        ),
        verdict=judge(ratio, None),
        value=ratio,
        how=f"median of {len(ours.rates)} runs of 1 s in turn; the stub is another bare HAProxy{forced}",
        data={
            "ours": ours.numbers(),
            "bare": other.numbers(),
            "ratio": ratio,
            "bare_config": bare.config,
        },
    )
