"""Guests that read without session tokens, out of the tables of HAProxy's workers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

import structlog

from imdsproxy.core.haproxy.counting import (
    GUESTS_TABLE,
    READERS_TABLE,
    parse_guests,
    parse_readers,
)
from imdsproxy.core.inventory import Inventory
from imdsproxy.core.policy import PolicyBook
from imdsproxy.core.token_report import TokenLedger, TokenReport, open_trees
from imdsproxy.dataplane.haproxy import Haproxy
from imdsproxy.dataplane.master import MasterClient
from imdsproxy.errors import RuntimeUnavailable
from imdsproxy.host.clock import Clock

_BEFORE_RELOAD_S: Final = 0.5


@dataclass(slots=True)
class TokenCounting:
    """Adds up what workers have counted: for a report, and before a reload ends a worker.

    Args:
        master: Whose workers are asked, draining ones too.
        clock: Of this host.
        ledger: The sums; they begin with this controller.
        one_in: Of so many reads that are not refused one is counted now; 0 for none.
    """

    master: MasterClient
    clock: Clock
    ledger: TokenLedger
    one_in: Callable[[], int]
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def look_before_reload(self) -> None:
        """As `refresh`; a worker that hangs must not keep it from being replaced."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_BEFORE_RELOAD_S):
                await self.refresh()

    async def refresh(self) -> None:
        """Read all workers' tables once; what cannot be read is read the next time."""
        async with self._lock:
            tables = (f"show table {GUESTS_TABLE}", f"show table {READERS_TABLE}")
            try:
                answers = await self.master.ask_workers(*tables)
            except RuntimeUnavailable as error:
                structlog.get_logger().debug("token counts cannot be read", reason=error.message)
                return
            now = self.clock.now().timestamp()
            self.ledger.keep_workers(answers)
            for worker, found in answers.items():
                if found:
                    guests, readers = found
                    self.ledger.add(worker, parse_guests(guests), parse_readers(readers), now)

    async def report(self, inventory: Inventory, policies: Callable[[], PolicyBook]) -> TokenReport:
        """Who still reads without session tokens, and which trees required tokens leave open."""
        await self.refresh()
        report = self.ledger.report(open_trees(inventory, policies()))
        return replace(report, one_in=self.one_in())


def open_counting(haproxy: Haproxy, clock: Clock, one_in: Callable[[], int]) -> TokenCounting:
    """One that begins now, and looks before each reload of this HAProxy."""
    ledger = TokenLedger(clock.now().timestamp())
    counting = TokenCounting(haproxy.master, clock, ledger, one_in)
    haproxy.before_reload.append(counting.look_before_reload)
    return counting
