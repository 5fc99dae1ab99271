"""Identity tokens of a host that signs itself: a token again, memory, and the absence of everything if they are off."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from bench.context import Bench
from bench.daemon import Daemon
from bench.figures import Bar, Row, judge
from bench.guest import Guest
from bench.issuer import (
    AUDIENCES,
    NAMED,
    TOKEN_PATH,
    issuer_settings,
    open_session,
    pids_of,
    request_token,
)
from bench.lab import guest, network_name
from bench.place import BenchError
from bench.procs import memory, wait_until
from bench.records import instance
from bench.sides import CONNECTIONS, Side, compare, load_in_turn, without_errors

__all__ = ["ROWS", "measure_identity"]

ROWS: Final = ("identity-again", "identity-memory", "identity-off")
_LEAF: Final = "/latest/meta-data/instance-id"
_URL: Final = "http://169.254.169.254"
_AGAIN_BAR: Final = Bar("≥ 0.5 x by processor time", at_least=0.5)
_MEMORY_BAR: Final = Bar("≤ 30 MB", at_most=30.0)
_OFF_BAR: Final = Bar("0", at_most=0.0)
_MOST_GUESTS: Final = 100
_OF_IDENTITY: Final = re.compile("identity|issuer|oauth2")
_LIBRARY: Final = "/cryptography/"
_WAIT_S: Final = 30.0
_OK: Final = 200
_MB: Final = 1e6


def measure_identity(bench: Bench, wanted: Callable[[str], bool]) -> Iterator[Row]:
    """Measure all rows: a daemon that gives tokens of three audiences, and one with default settings."""
    bench.lab.grow(2)
    if wanted("identity-again") or wanted("identity-memory"):
        yield from (row for row in _with_tokens(bench, wanted) if wanted(row.key))
    if wanted("identity-off"):
        yield _off_row(bench)


def _with_tokens(bench: Bench, wanted: Callable[[str], bool]) -> Iterator[Row]:
    directory = bench.directory / "on"
    directory.mkdir()
    count = min(_MOST_GUESTS, bench.scale.instances)
    settings: dict[str, dict[str, object]] = {
        "identity": issuer_settings(directory),
        "policy": {"host": NAMED},
    }
    daemon = Daemon(directory, settings)
    try:
        daemon.start()
        _fill(bench, daemon, network_name(0), count)
        asking = [Guest(bench.lab, network_name(0), guest(one)) for one in range(count)]
        sessions = [open_session(one) for one in asking]
        for one, session in zip(asking, sessions, strict=True):
            _wait_token(one, session)
        time.sleep(bench.scale.settle_s)
        if wanted("identity-memory"):
            yield _memory_row(daemon, count)
        for one in asking:
            one.close()
        if wanted("identity-again"):
            # HAProxy is reloaded when the signer has made its key.
            yield _again_row(bench, daemon.wait_settled().worker, sessions[0])
    finally:
        daemon.stop()


def _fill(bench: Bench, daemon: Daemon, name: str, count: int) -> None:
    """Store guests of one network, and wait until the network is served."""
    guests = [
        instance(f"guest-{name}-{one}", {name: [guest(one)]}, with_user_data=False)
        for one in range(count)
    ]
    daemon.put([bench.network(name)], guests)
    daemon.wait_serving(1)


def _wait_token(one: Guest, session: str) -> None:
    for audience in AUDIENCES:
        if not wait_until(lambda: request_token(one, session, audience).status == _OK, _WAIT_S):  # noqa: B023
            raise BenchError(f"{one.address} gets no token for {audience}")


def _memory_row(daemon: Daemon, count: int) -> Row:
    sizes = sorted(memory([pid]).pss / _MB for pid in pids_of(daemon.directory))
    value = sum(sizes)
    return Row(
        key="identity-memory",
        what=f"memory of both processes for identity tokens, with {count} guests of {len(AUDIENCES)} audiences",
        figure=f"{value:.1f} MB ({' and '.join(f'{one:.1f}' for one in sizes)} MB)",
        verdict=judge(value, _MEMORY_BAR),
        bar=_MEMORY_BAR.text,
        value=value,
        how="PSS at rest, on a host that signs itself; a host of a fleet has no signer",
        data={"mb": sizes},
    )


def _again_row(bench: Bench, worker: int, session: str) -> Row:
    """Load a document and a token, both out of HAProxy's memory."""
    script = bench.directory / "put.lua"
    script.write_text('wrk.method = "PUT"\n')
    document = Side(f"{_URL}{_LEAF}", worker, (session,))
    token = Side(
        f"{_URL}{TOKEN_PATH}",
        worker,
        (session, f"X-imdsproxy-audience: {AUDIENCES[0]}"),
        script=script,
    )
    load_in_turn(bench, [document, token], bench.scale.seconds)
    without_errors(document, token)
    row = compare(
        "identity-again",
        token,
        document,
        what=(
            f"an identity token again, out of HAProxy's memory, beside {_LEAF} of the same guest, "
            f"{CONNECTIONS} connections"
        ),
        how=(
            f"least of {len(token.rates)} runs of {bench.scale.seconds:g} s in turn; both requests show the same "
            "session token"
        ),
        beside="document",
    )
    by_cost = document.cost_us / token.cost_us
    return replace(row, verdict=judge(by_cost, _AGAIN_BAR), bar=_AGAIN_BAR.text, value=by_cost)


@dataclass(frozen=True, slots=True)
class _Traces:
    """Traces of identity tokens in a running daemon.

    Attributes:
        rules: Lines of HAProxy's configuration.
        files: Files and directories of its own directories.
        libraries: Parts of the library for keys in the controller's memory.
    """

    processes: int
    rules: int
    files: int
    libraries: int

    @property
    def count(self) -> int:
        return self.processes + self.rules + self.files + self.libraries


def _traces(daemon: Daemon) -> _Traces:
    config = (daemon.runtime / "haproxy.cfg").read_text()
    places = (daemon.runtime, daemon.directory / "state")
    files = [path for place in places for path in place.iterdir() if "identity" in path.name]
    mapped = Path(f"/proc/{daemon.processes().controller}/maps").read_text()
    return _Traces(
        len(pids_of(daemon.directory)),
        sum(_OF_IDENTITY.search(line) is not None for line in config.splitlines()),
        len(files),
        sum(_LIBRARY in line for line in mapped.splitlines()),
    )


def _off_row(bench: Bench) -> Row:
    daemon = Daemon(bench.directory / "off")
    try:
        daemon.start()
        _fill(bench, daemon, network_name(1), 1)
        found = _traces(daemon)
    finally:
        daemon.stop()
    return Row(
        key="identity-off",
        what="traces of identity tokens in a daemon that gives none, as by default",
        figure=(
            f"{found.processes} processes, {found.rules} lines of HAProxy's configuration, {found.files} files, "
            f"{found.libraries} parts of the library for keys in the controller's memory"
        ),
        verdict=judge(found.count, _OFF_BAR),
        bar=_OFF_BAR.text,
        value=found.count,
        how="counted in a running daemon with one guest",
        data={"rules": found.rules, "processes": found.processes, "files": found.files},
    )
