"""Databases of Open vSwitch and OVN, followed in a thread by python-ovs (ovsdb(7), RFC 7047).

python-ovs has its own event loop and offers no descriptor to wait for, so each connection has a thread.
"""

import asyncio
import contextlib
import os
import ssl
import threading
import uuid
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from random import SystemRandom
from typing import Any, Final, Generic, TypeAlias, TypeVar

from imdsproxy.errors import SourceUnavailable
from imdsproxy.host.python_ovs import Library, import_library, plan_pauses

View = TypeVar("View")

_Idl: TypeAlias = Any
Transaction: TypeAlias = Any
Row: TypeAlias = Any
Table: TypeAlias = Any

Rows: TypeAlias = Mapping[str, Iterable[Any]]
Conditions: TypeAlias = Mapping[str, Sequence[object]]
Change: TypeAlias = Callable[[Mapping[str, Table], Transaction], None]

_CHECK_S: Final = 1.0
"""Interval at which the thread checks its connection, in seconds; python-ovs wakes it for all other events."""

_FIRST_ANSWER_S: Final = 30.0
"""Silence after which the client probes a new connection, in seconds. A restarted server may have to answer all hosts
first, and each reconnection adds to its work."""


@dataclass(frozen=True, slots=True)
class Schema:
    """Followed part of a database.

    Attributes:
        database: Name of the database, as `OVN_Southbound`.
        tables: Columns of each table, with their types in the server's schema. References to other rows are plain
            UUIDs.
    """

    database: str
    tables: Mapping[str, Mapping[str, object]]

    def as_json(self) -> dict[str, object]:
        tables = {
            name: {"columns": {column: {"type": kind} for column, kind in columns.items()}}
            for name, columns in self.tables.items()
        }
        return {"name": self.database, "version": "0.0.0", "tables": tables}


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files for `ssl:`. python-ovs has one set for all connections of a process."""

    private_key: Path
    certificate: Path
    ca: Path


def check_tls(tls: Tls) -> None:
    """Check that the files can be read; raise `OSError` if a file cannot be read, or the files do not match."""
    for file in (tls.private_key, tls.certificate, tls.ca):
        file.read_bytes()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(tls.ca)
    context.load_cert_chain(tls.certificate, tls.private_key)


@dataclass(frozen=True, slots=True)
class Reading(Generic[View]):
    """State of the followed rows at one moment.

    Attributes:
        view: Result of the reader; the last one if the connection is lost.
        lost: Reason why the rows are not followed now: no connection, or no answer yet on a new one.
    """

    view: View | None
    lost: str | None = None


@dataclass(frozen=True, slots=True)
class _Waiting:
    transaction: Transaction
    done: Future[None]


@dataclass(slots=True)
class Ovsdb(Generic[View]):
    """Connection to a database, reopened when it is lost.

    Args:
        remotes: Addresses in ovn-controller's form: `unix:PATH`, `tcp:ADDRESS:PORT`, `ssl:ADDRESS:PORT`, joined by
            commas. Any server will do: reading does not need the leader.
        read: Function that makes a view from all rows, and returns conditions for the rows it wants; called in the
            thread after each change. The view counts once the wanted rows have arrived.
        conditions: Initial conditions by table (RFC 7047); a table without a condition is read whole.
        parse: Parsers by table, whose results `read` gets instead of rows; called in the thread once for each change of
            a row.
        probe_s: Seconds of silence until a probe, and again until the connection counts as lost. At least 1.
        random: Source of numbers from 0 to 1, to spread connection attempts.
    """

    remotes: str
    schema: Schema
    read: Callable[[Rows], tuple[View, Conditions]]
    conditions: Conditions = field(default_factory=dict)
    parse: Mapping[str, Callable[[Row], object]] = field(default_factory=dict)
    probe_s: float = 60.0
    tls: Tls | None = None
    random: Callable[[], float] = field(default_factory=lambda: SystemRandom().random)
    _library: Library = None
    _changes: list[tuple[Change, Future[None]]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _parsed: dict[uuid.UUID, tuple[Row, object]] = field(default_factory=dict)
    _wake: int | None = None
    _ended: bool = False

    async def follow(self) -> AsyncGenerator[Reading[View], None]:
        """Yield every view from now on; of several that arrive at once, only the last."""
        self._library = import_library()
        loop = asyncio.get_running_loop()
        arrived = asyncio.Event()
        latest: list[Reading[View] | Exception] = []

        def take(reading: Reading[View] | Exception) -> None:
            latest[:] = [reading]
            arrived.set()

        def publish(reading: Reading[View] | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and no task waits
                loop.call_soon_threadsafe(take, reading)

        def run() -> None:
            try:
                self._run(wake, publish)
            except Exception as error:  # noqa: BLE001 - raised in `follow`
                publish(error)

        wake, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._ended = False
        threading.Thread(target=run, name="imdsproxy-ovsdb", daemon=True).start()
        try:
            while True:
                await arrived.wait()
                arrived.clear()
                reading = latest[0]
                if isinstance(reading, Exception):
                    raise reading
                yield reading
        finally:
            self._ended = True
            self._rouse()
            os.close(self._wake)
            self._wake = None

    def transact(self, change: Change) -> asyncio.Future[None]:
        """Run a transaction: the thread calls `change` with the tables and the transaction.

        The future raises `SourceUnavailable` if the server refuses, or the connection is lost.
        """
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()
        with self._lock:
            self._changes.append((change, done))
        self._rouse()
        return asyncio.wrap_future(done)

    def _rouse(self) -> None:
        if self._wake is not None:
            with contextlib.suppress(BlockingIOError, BrokenPipeError):
                os.write(self._wake, b".")

    # The methods below run in the thread.

    def _run(self, wake: int, publish: Callable[[Reading[View]], None]) -> None:
        idl = self._open()
        seen, view, made = 0, None, None
        published: Reading[View] | None = None
        running: list[_Waiting] = []
        was_connected = False
        self._spread(idl)
        try:
            while not self._ended:
                failed = self._step(idl, connected=was_connected)
                changed = idl.change_seqno != seen
                if changed:
                    seen = idl.change_seqno
                    made, wanted = self.read(self._rows(idl.tables))
                    for table, condition in wanted.items():
                        idl.cond_change(table, list(condition))
                # The new conditions may select only rows that are already there: then no change follows.
                if _is_settled(idl):
                    view = made
                connected = idl._session.is_connected()  # noqa: SLF001 - python-ovs has no other way to ask
                if was_connected and not connected:
                    self._spread(idl)
                was_connected = connected
                # Monitoring is the proof: the kernel accepts connections even for a hung server.
                following = connected and idl.state == idl.IDL_S_MONITORING
                self._probe(idl, following=following)
                lost = self._reason(failed, connected=connected, following=following)
                reading = Reading(view, lost)
                if reading != published:
                    published = reading
                    publish(reading)
                running = self._commit(idl, running)
                # python-ovs reads 50 messages at a time, and TLS may have buffered more than the socket shows.
                self._wait(wake, None if failed else idl, running, 0 if changed else _CHECK_S)
        finally:
            idl.close()
            os.close(wake)
            self._abandon(running)

    def _step(self, idl: _Idl, *, connected: bool) -> str | None:
        try:
            if self.tls is not None and not connected:
                # python-ovs would exit, and leak a socket, at a file that it cannot read.
                check_tls(self.tls)
            idl.run()
        except OSError as error:
            return str(error)
        return None

    def _wait(
        self, wake: int, idl: _Idl | None, running: Iterable[_Waiting], longest_s: float
    ) -> None:
        poller = self._library.poller.Poller()
        if idl is not None:
            idl.wait(poller)
        for one in running:
            one.transaction.wait(poller)
        poller.fd_wait(wake, self._library.poller.POLLIN)
        poller.timer_wait(int(longest_s * 1000))
        poller.block()
        with contextlib.suppress(BlockingIOError):
            os.read(wake, 4096)

    def _reason(self, failed: str | None, *, connected: bool, following: bool) -> str | None:
        if failed is not None:
            return f"no connection to {self.remotes}: {failed}"
        if following:
            return None
        return f"no {'answer from' if connected else 'connection to'} {self.remotes}"

    def _probe(self, idl: _Idl, *, following: bool) -> None:
        """Set the probe interval; by default python-ovs never probes a server at a unix socket."""
        silence_s = self.probe_s if following else max(self.probe_s, _FIRST_ANSWER_S)
        idl._session.reconnect.set_probe_interval(int(silence_s * 1000))  # noqa: SLF001 - as above

    def _spread(self, idl: _Idl) -> None:
        """Randomise the pauses between connection attempts, so that hosts do not reconnect at the same time."""
        first_ms, longest_ms = plan_pauses(self.random())
        idl._session.reconnect.set_backoff(first_ms, longest_ms)  # noqa: SLF001 - as above

    def _rows(self, tables: Mapping[str, Table]) -> Rows:
        kept: dict[uuid.UUID, tuple[Row, object]] = {}
        found: dict[str, Iterable[Any]] = {}
        for name, table in tables.items():
            parse = self.parse.get(name)
            if parse is None:
                found[name] = table.rows.values()
                continue
            made = []
            for row in table.rows.values():
                # After a full resync each row is a new object.
                before = self._parsed.get(row.uuid)
                kept[row.uuid] = one = (
                    before if before is not None and before[0] is row else (row, parse(row))
                )
                made.append(one[1])
            found[name] = made
        self._parsed = kept
        return found

    def _forget(self, _event: str, row: Row, _updates: Row | None = None) -> None:
        self._parsed.pop(row.uuid, None)

    def _open(self) -> _Idl:
        library = self._library
        if self.tls is not None:
            stream = library.stream.Stream
            stream.ssl_set_private_key_file(str(self.tls.private_key))
            stream.ssl_set_certificate_file(str(self.tls.certificate))
            stream.ssl_set_ca_cert_file(str(self.tls.ca))
        helper = library.db.idl.SchemaHelper(schema_json=self.schema.as_json())
        for table, columns in self.schema.tables.items():
            helper.register_columns(table, list(columns))
        idl = library.db.idl.Idl(self.remotes, helper, leader_only=False)
        idl.notify = self._forget
        for table, condition in self.conditions.items():
            idl.cond_change(table, list(condition))
        return idl

    def _commit(self, idl: _Idl, running: list[_Waiting]) -> list[_Waiting]:
        with self._lock:
            new, self._changes = self._changes, []
        for change, done in new:
            transaction = self._library.db.idl.Transaction(idl)
            try:
                change(idl.tables, transaction)
            except Exception as error:  # noqa: BLE001 - raised where it is waited for
                transaction.abort()
                done.set_exception(error)
                continue
            running.append(_Waiting(transaction, done))
            transaction.commit()
        left = []
        for one in running:
            transaction, status = one.transaction, one.transaction.commit()
            if status == transaction.INCOMPLETE:
                left.append(one)
            elif status in (transaction.SUCCESS, transaction.UNCHANGED):
                one.done.set_result(None)
            else:
                word, why = transaction.status_to_string(status), transaction.get_error()
                text = f"{self.remotes}: {word} {why or ''}".strip()
                one.done.set_exception(SourceUnavailable(text))
        return left

    def _abandon(self, running: Iterable[_Waiting]) -> None:
        error = SourceUnavailable(f"the connection to {self.remotes} is closed")
        with self._lock:
            new, self._changes = self._changes, []
        for done in (*(one.done for one in running), *(done for _, done in new)):
            done.set_exception(error)


def _is_settled(idl: _Idl) -> bool:
    states = (table.condition_state for table in idl.tables.values())
    return not any(state.latest is not state.acked for state in states)
