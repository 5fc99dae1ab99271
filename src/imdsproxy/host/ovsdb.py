"""Databases of Open vSwitch and OVN, followed in a thread by python-ovs (ovsdb(7), RFC 7047).

python-ovs has an event loop of its own and no descriptor to wait for from outside, so each connection has a thread. It
is installed by the distribution (Debian: python3-openvswitch) or as `imdsproxy[ovn]`, and imported only when a
connection is made; no other module imports it.
"""

import asyncio
import contextlib
import importlib
import os
import threading
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Generic, TypeAlias, TypeVar

from imdsproxy.errors import SourceUnavailable, optional_library

View = TypeVar("View")

_Idl: TypeAlias = Any
Transaction: TypeAlias = Any
_Library: TypeAlias = Any
Row: TypeAlias = Any
Table: TypeAlias = Any

Rows: TypeAlias = Mapping[str, Iterable[Row]]
Conditions: TypeAlias = Mapping[str, Sequence[object]]
Change: TypeAlias = Callable[[Mapping[str, Table], Transaction], None]

_CHECK_S: Final = 1.0
"""How often the thread looks whether its connection is still there; python-ovs wakes it for everything else."""


@dataclass(frozen=True, slots=True)
class Schema:
    """The part of a database that is followed.

    Attributes:
        database: Its name, as `OVN_Southbound`.
        tables: The columns of each table, with their types as the server's schema has them. References to other rows
            are given as plain UUIDs.
    """

    database: str
    tables: Mapping[str, Mapping[str, object]]

    def as_json(self) -> dict[str, object]:
        """As python-ovs reads a schema."""
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


@dataclass(frozen=True, slots=True)
class Reading(Generic[View]):
    """What was read at one moment.

    Attributes:
        view: What the reader made of the rows; as before where the connection is lost.
        lost: Why there is no connection, if so.
    """

    view: View | None
    lost: str | None = None


@dataclass(frozen=True, slots=True)
class _Waiting:
    transaction: Transaction
    done: Future[None]


@dataclass(slots=True)
class Ovsdb(Generic[View]):
    """One connection to a database; made again when it is lost.

    Args:
        remotes: As ovn-controller takes them: `unix:PATH`, `tcp:ADDRESS:PORT`, `ssl:ADDRESS:PORT`, several joined by
            commas. Any of them will do: what is read need not come from the leader.
        schema: What is followed.
        read: Makes a view of the rows of each table, and says which rows it wants; called in the thread, after each
            change. A view counts once the rows are there that were asked for with it.
        conditions: Which rows are wanted at first, as RFC 7047 has conditions; of a table without one all are.
        probe_s: Seconds after which a silent server is asked whether it is there.
        tls: For `ssl:`.
    """

    remotes: str
    schema: Schema
    read: Callable[[Rows], tuple[View, Conditions]]
    conditions: Conditions = field(default_factory=dict)
    probe_s: float = 60.0
    tls: Tls | None = None
    _library: _Library = None
    _changes: list[tuple[Change, Future[None]]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _wake: int | None = None
    _ended: bool = False

    async def follow(self) -> AsyncGenerator[Reading[View], None]:
        """Every view from now on; where several come at once, the last of them.

        Raises:
            LibraryMissing: python-ovs is not installed.
        """
        self._library = import_library()
        loop = asyncio.get_running_loop()
        arrived = asyncio.Event()
        latest: list[Reading[View] | Exception] = []

        def take(reading: Reading[View] | Exception) -> None:
            latest[:] = [reading]
            arrived.set()

        def publish(reading: Reading[View] | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nothing waits any more
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
        """Write: `change` gets the tables and a transaction, in the thread.

        Raises (in the future):
            SourceUnavailable: The server refuses, or the connection is lost.
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

    # In the thread

    def _run(self, wake: int, publish: Callable[[Reading[View]], None]) -> None:
        library, idl = self._library, self._open()
        seen, view, made = 0, None, None
        published: Reading[View] | None = None
        running: list[_Waiting] = []
        try:
            while not self._ended:
                idl.run()
                if idl.change_seqno != seen:
                    seen = idl.change_seqno
                    made, wanted = self.read(
                        {name: table.rows.values() for name, table in idl.tables.items()}
                    )
                    for table, condition in wanted.items():
                        idl.cond_change(table, list(condition))
                # The rows that were asked for last may be no more than those that are there: no change then.
                if _is_settled(idl):
                    view = made
                connected = idl._session.is_connected()  # noqa: SLF001 - python-ovs has no other way to ask
                lost = None if connected and seen else f"no connection to {self.remotes}"
                reading = Reading(view, lost)
                if reading != published:
                    published = reading
                    publish(reading)
                running = self._commit(idl, running)
                poller = library.poller.Poller()
                idl.wait(poller)
                for one in running:
                    one.transaction.wait(poller)
                poller.fd_wait(wake, library.poller.POLLIN)
                poller.timer_wait(int(_CHECK_S * 1000))
                poller.block()
                with contextlib.suppress(BlockingIOError):
                    os.read(wake, 4096)
        finally:
            idl.close()
            os.close(wake)
            self._abandon(running)

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
        idl = library.db.idl.Idl(
            self.remotes, helper, probe_interval=int(self.probe_s * 1000), leader_only=False
        )
        for table, condition in self.conditions.items():
            idl.cond_change(table, list(condition))
        return idl

    def _commit(self, idl: _Idl, running: list[_Waiting]) -> list[_Waiting]:
        """Send what is new, and settle what was answered; what is not answered yet."""
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
    """Whether the rows are there that were asked for last."""
    states = (table.condition_state for table in idl.tables.values())
    return not any(state.latest is not state.acked for state in states)


def import_library() -> _Library:
    """Python-ovs.

    Raises:
        LibraryMissing: It is not installed, or not for this Python.
    """
    with optional_library(
        "Open vSwitch's Python module",
        "apt install python3-openvswitch, or pip install 'imdsproxy[ovn]'",
    ):
        library = importlib.import_module("ovs")
        for name in ("db.idl", "poller", "stream", "vlog"):
            importlib.import_module(f"ovs.{name}")
    # What it has to say is in `Reading.lost`; else it writes to standard error.
    library.vlog.Vlog.init(None)
    library.vlog.Vlog.set_level("any", "any", "off")
    return library
