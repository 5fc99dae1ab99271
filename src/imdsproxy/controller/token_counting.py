"""Number of reads without session tokens, counted by HAProxy's workers and summed over workers and controllers."""

import asyncio
import json
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, ClassVar, Final, TypeAlias

import structlog

from imdsproxy.controller.token_report import (
    InstanceTokens,
    Kept,
    OpenTree,
    TokenLedger,
    TokenReport,
    open_trees,
)
from imdsproxy.controller.token_verdict import Counted, judge_instance, judge_tokens, projects_of
from imdsproxy.errors import NotFound, Problem, RuntimeUnavailable
from imdsproxy.haproxy.process import Haproxy
from imdsproxy.haproxy.rules.counting import (
    GUESTS_TABLE,
    READERS_TABLE,
    parse_guests,
    parse_readers,
)
from imdsproxy.host.clock import Clock
from imdsproxy.host.process import read_stat
from imdsproxy.host.sqlite_file import SideCache
from imdsproxy.host.turns import in_turns
from imdsproxy.model.entities import InstanceId
from imdsproxy.model.inventory import Inventory
from imdsproxy.model.policy import PolicyBook
from imdsproxy.reconcile.part import By, Impact, Part

_Key: TypeAlias = tuple[str, ...]

_SAVE_EVERY_S: Final = 50.0
_VERDICTS_SHOWN: Final = 100
_SCHEMA: Final = "CREATE TABLE kept (key TEXT PRIMARY KEY, numbers TEXT NOT NULL) WITHOUT ROWID"


def _read(connection: sqlite3.Connection) -> Iterator[tuple[_Key, Kept]]:
    for key, numbers in connection.execute("SELECT key, numbers FROM kept"):
        yield tuple(json.loads(key)), tuple(json.loads(numbers))


def _write(connection: sqlite3.Connection, key: _Key, numbers: Kept | None) -> None:
    name = json.dumps(key)
    if numbers is None:
        connection.execute("DELETE FROM kept WHERE key = ?", (name,))
    else:
        row = (name, json.dumps(numbers))
        connection.execute("INSERT OR REPLACE INTO kept VALUES (?, ?)", row)


@dataclass(slots=True)
class TokenCounting(Part):
    """Sums of workers' counts, updated every minute, for a report, and before a reload ends a worker.

    The sums are on disk within two minutes, with the last count of each worker. A worker's table outlives the
    controller, so the next controller misses nothing while the worker lives.

    Args:
        one_in: Getter of the sampling rate: HAProxy counts one in this many accepted reads; 0 counts none.
        path: File of the sums, which may be deleted.

    Attributes:
        recalled: Whether the sums include those of earlier controllers.
    """

    impact: ClassVar = Impact.UNNOTICED
    haproxy: Haproxy
    clock: Clock
    one_in: Callable[[], int]
    path: Path
    ledger: TokenLedger = field(init=False)
    recalled: bool = False
    _cache: SideCache[_Key, Kept] = field(init=False)
    _saved: float = field(init=False)
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        self.ledger = TokenLedger(self.clock.now().timestamp())
        lost = "counts of reads without tokens are not kept"
        self._cache = SideCache(self.path, _SCHEMA, _read, _write, "tokens.count_reads", lost)
        self._saved = self.clock.monotonic()
        self.haproxy.before_reload.append(self.refresh)

    def problems(self) -> tuple[Problem | None]:
        """Return why counts do not outlive this controller."""
        return (self._cache.problem,)

    def metadata_no_token(self) -> Annotated[By, "counter", "network"]:
        """Reads without a session token that were not refused for that, by network as above.

        Reads of the EC2 tree and of trees that require tokens are counted: each read, an estimate from one read in 20,
        or none, by `tokens.count_reads`. The count continues over restarts of the controller.
        """
        # Until earlier controllers' counts are loaded, Prometheus would take them for new reads.
        return self.ledger.read if self.recalled else None

    def metadata_no_token_rejected(self) -> Annotated[By, "counter", "network"]:
        """Reads refused because a session token is required, by network as above."""
        return self.ledger.refused if self.recalled else None

    async def refresh(self) -> None:
        """Read all workers' tables once; retry at the next call what cannot be read."""
        async with self._lock:
            if not self.recalled:
                rows = await asyncio.to_thread(self._cache.load)
                self.ledger.recall(rows)
                self.recalled = True
            self.ledger.note_mode(self.one_in(), self.clock.now().timestamp())
            await self._look()
            if self.clock.monotonic() - self._saved >= _SAVE_EVERY_S:
                await self._save()

    async def save(self) -> None:
        async with self._lock:
            # If the file was not read yet, its larger sums must not be overwritten.
            if self.recalled:
                await self._save()

    async def _save(self) -> None:
        self._cache.keep(self.ledger.changes)
        self.ledger.changes.clear()
        self._saved = self.clock.monotonic()
        await asyncio.to_thread(self._cache.save)

    async def _look(self) -> None:
        tables = (f"show table {GUESTS_TABLE}", f"show table {READERS_TABLE}")
        workers: list[str] = []
        try:
            async for pid, found in self.haproxy.master.ask_workers(*tables):
                stat = read_stat(pid)
                # A pid can be reused, so add the start time.
                worker = f"{pid}.{0 if stat is None else stat.started}"
                workers.append(worker)
                if found:
                    # Add each answer at once: another worker may hang until the time is over.
                    rows = parse_guests(found[0]), parse_readers(found[1])
                    self.ledger.add(worker, *rows, self.clock.now().timestamp())
        except RuntimeUnavailable as error:
            structlog.get_logger().debug("token counts cannot be read", reason=error.message)
            return
        self.ledger.keep_workers(workers)

    async def report_tokens(
        self,
        inventory: Inventory,
        policies: Callable[[], PolicyBook],
        days: int,
        scope: tuple[str, str] | None = None,
    ) -> TokenReport:
        """Report which guests read without session tokens, which trees stay open, and whether to require tokens.

        Args:
            days: Days without a read without a token that the verdict yes requires.
            scope: `network` or `project`, and its id, for a verdict on that scope only.

        Raises:
            NotFound: The scope has no instance.
        """
        await self.refresh()
        book, one_in = policies(), self.one_in()
        trees, projects = list[OpenTree](), set[str]()
        async for identity in in_turns(sorted(inventory.instances)):
            if (instance := inventory.instances.get(identity)) is not None:
                trees += open_trees(inventory, book, identity)
                projects |= projects_of(instance)
        report = replace(self.ledger.report(trees), one_in=one_in)
        counted = Counted(report.since, report.all_since, one_in)
        now = self.clock.now().timestamp()
        verdicts = judge_tokens(
            report.guests, inventory, book, counted, projects=projects, now=now, days=days
        )
        if scope is not None:
            verdicts = [one for one in verdicts if (one.scope, one.id) == scope]
            if not verdicts:
                raise NotFound(f"no instance is in {' '.join(scope)}")
            return replace(report, days=days, verdicts=tuple(verdicts))
        host, others = verdicts[0], sorted(verdicts[1:], key=lambda one: one.ready != "no")
        return replace(report, days=days, verdicts=(host, *others[: _VERDICTS_SHOWN - 1]))

    async def report_instance(
        self, inventory: Inventory, policies: Callable[[], PolicyBook], instance: InstanceId
    ) -> InstanceTokens:
        """Report how one instance reads without session tokens, without a look at any other."""
        await self.refresh()
        one_in, trees = self.one_in(), open_trees(inventory, policies(), instance)
        report = self.ledger.report(trees)
        guests = tuple(one for one in report.guests if one.instance == instance)
        counted = Counted(report.since, report.all_since, one_in)
        now = self.clock.now().timestamp()
        verdict = judge_instance(instance, guests, counted, now=now, days=report.days)
        return InstanceTokens(report.since, one_in, verdict, guests, tuple(trees))
