"""imdsproxy in front of Nova: signed requests beside a bare HAProxy that forwards to the same stand-in."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from bench.bare import Bare, forwarding, render_bare, run_bare, worker_limits
from bench.context import Bench
from bench.daemon import Daemon
from bench.figures import Bar, Row
from bench.guest import Guest
from bench.lab import guest, network_name
from bench.nova import (
    PATH,
    SLOW_MS,
    Stub,
    identity,
    names_itself,
    nova_guest,
    nova_settings,
    run_stub,
)
from bench.place import BenchError
from bench.procs import pin
from bench.sides import (
    CONNECTIONS,
    Side,
    compare,
    load_in_turn,
    without_errors,
)

__all__ = ["measure_forwarding"]

_BARE_PORT: Final = 8080
_BAR: Final = Bar("≥ 0.85 x", at_least=0.85)
_CLOSE: Final = ("Connection: close",)


@dataclass(frozen=True, slots=True)
class _Kind:
    """A row: the guests' requests, and the kind of Nova."""

    key: str
    what: str
    headers: tuple[str, ...] = ()
    slow: bool = False


_KINDS: Final = (
    _Kind("nova-signed", "signed and sent to Nova, keep-alive"),
    _Kind("nova-signed-close", "the same, `Connection: close`", _CLOSE),
    _Kind("nova-slow", f"the same, keep-alive, by a Nova that takes {SLOW_MS} ms", slow=True),
)


def measure_forwarding(bench: Bench, wanted: Callable[[str], bool]) -> Iterator[Row]:
    """Measure the rows `nova-signed`, `nova-signed-close` and `nova-slow`."""
    bench.lab.grow(1)
    with run_stub(bench.binary, bench.directory) as stub:
        pin(stub.pid, {bench.cpus[1]})
        for slow in (False, True):
            kinds = [one for one in _KINDS if one.slow is slow and wanted(one.key)]
            if kinds:
                with _stage(bench, stub, slow=slow) as stage:
                    yield from (stage.measure(kind) for kind in kinds)


@contextlib.contextmanager
def _stage(bench: Bench, stub: Stub, *, slow: bool) -> Iterator[_Stage]:
    name = network_name(0)
    port = stub.slow_port if slow else stub.port
    directory = bench.directory / ("nova-slow" if slow else "nova")
    directory.mkdir(exist_ok=True)
    daemon = Daemon(directory, nova_settings(directory, port))
    try:
        daemon.start()
        daemon.put([bench.network(name)], [nova_guest(name)])
        daemon.wait_serving(1)
        one = Guest(bench.lab, name)
        if not names_itself(name, one.get(PATH)):
            raise BenchError("the guest is not answered by Nova as itself")
        one.close()
        limits = worker_limits((daemon.runtime / "haproxy.cfg").read_text())
        rules = forwarding(f"127.0.0.1:{port}", identity(name).headers(guest(0)))
        bind = f"169.254.169.254:{_BARE_PORT} namespace {name}"
        config = render_bare(limits, [bind], rules)
        with run_bare(bench.binary, bench.directory, directory.name, config) as bare:
            yield _Stage(bench, daemon.wait_settled().worker, bare)
    finally:
        daemon.stop()


@dataclass(slots=True)
class _Stage:
    """A daemon and a bare HAProxy in front of the same stand-in."""

    bench: Bench
    worker: int
    bare: Bare

    def measure(self, kind: _Kind) -> Row:
        """Measure one row."""
        scale = self.bench.scale
        ours = Side(f"http://169.254.169.254{PATH}", self.worker, kind.headers)
        other = Side(f"http://169.254.169.254:{_BARE_PORT}{PATH}", self.bare.pid, kind.headers)
        load_in_turn(self.bench, [other, ours], scale.seconds)
        without_errors(ours, other)
        return compare(
            kind.key,
            ours,
            other,
            what=f"{kind.what}, {CONNECTIONS} connections",
            how=(
                f"median of {len(ours.rates)} runs of {scale.seconds:g} s, in turn with a bare HAProxy that sets four "
                "constant headers and forwards over kept connections; both to the same stand-in for Nova (HAProxy, "
                "1.1 kB), which checks the signature; HAProxy on one processor, wrk and the stand-in on the other"
            ),
            bar=_BAR,
            beside="bare",
            more={"bare_config": self.bare.config},
        )
