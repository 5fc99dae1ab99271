"""Taking over new settings while guests are served."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Final

import structlog

from imdsproxy.app.policy_store import PolicyChange, PolicyStore
from imdsproxy.app.record_loop import RecordLoop
from imdsproxy.config.changes import SettingsHolder, SettingsReload, with_contents
from imdsproxy.config.schema import Settings
from imdsproxy.controller.build import prepare_jail
from imdsproxy.core.nova import changed_secrets
from imdsproxy.dataplane.layout import Layout
from imdsproxy.errors import ImdsproxyError, Problem
from imdsproxy.host.clock import Clock
from imdsproxy.host.notify import ServiceNotifier
from imdsproxy.listeners.loop import ListenerLoop
from imdsproxy.nova.upstream import NovaUpstream

_TAKE_OVER_S: Final = 10.0


@dataclass(slots=True)
class SettingsReloader:
    """Reads the settings again, for the admin API and for SIGHUP."""

    holder: SettingsHolder
    layout: Layout
    clock: Clock
    notifier: ServiceNotifier
    nova: NovaUpstream
    policy_store: PolicyStore
    records: RecordLoop
    listeners: ListenerLoop
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def reload(
        self,
        problems: Callable[[], tuple[Problem, ...]],
        allow_dropped: bool,  # noqa: FBT001 - as `Services.reload`
    ) -> SettingsReload:
        """Read the settings again; what can be taken over live or by a reload is.

        Returns once guests are answered by them: an operator who gives a Nova its next secret must know when.

        Args:
            problems: What may keep them from guests.
            allow_dropped: Whether settings may be missing that were there.
        """
        result, taken_over = self._begin(allow_dropped=allow_dropped)
        if taken_over is None or (await asyncio.wait([taken_over], timeout=_TAKE_OVER_S))[0]:
            return result
        reasons = dict.fromkeys(problem.reason for problem in problems())
        pending = ("the data plane has not confirmed it yet", *reasons)
        return replace(result, haproxy_reloaded=False, pending=pending)

    def _begin(
        self, *, allow_dropped: bool = False
    ) -> tuple[SettingsReload, asyncio.Task[None] | None]:
        self.notifier.reloading(int(self.clock.monotonic() * 1e6))
        before, remade = self.nova.backends(), False
        routing = self.nova.routing
        policy_store = PolicyChange(records=False, keys=False)

        def accept(after: Settings) -> None:
            nonlocal remade, policy_store
            prepare_jail(after, self.layout)
            policy_store = self.policy_store.read(after)
            remade = self.nova.read(after.nova)
            # Which is in every record that is compiled, as Nova's signatures are.
            remade |= after.documents.region != self.holder.settings.documents.region

        try:
            result = self.holder.reload(accept, allow_dropped=allow_dropped)
        finally:
            self.notifier.ready()
        result = with_contents(result, changed_secrets(routing, self.nova.routing))
        if self.nova.backends() != before:
            # Also where the settings are the same, and a file that they name is not.
            result = replace(result, haproxy_reloaded=True)
        if policy_store.keys:
            result = with_contents(result, ("tokens.key_file",))
        if not (remade or policy_store.records or policy_store.keys or result.haproxy_reloaded):
            return result, None
        ticket = self.records.resync() if remade or policy_store.records else None
        return result, self._later(self._take_over(ticket, policy_store))

    async def _take_over(self, ticket: int | None, policy_store: PolicyChange) -> None:
        if policy_store.keys:
            await self.policy_store.keys.confirmed()
        # Rules that take another signature, or another set, find it in the records already.
        if ticket is not None:
            await self.records.tickets.wait(ticket)
        await self.nova.resolve()
        await self.listeners.tickets.wait(self.listeners.touch("settings changed"))

    def _later(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def hang_up(self) -> None:
        """SIGHUP: as `imdsproxy reload`; the log has the result."""
        try:
            result, _ = self._begin()
        except ImdsproxyError as error:
            structlog.get_logger().error("settings not reloaded", code=error.code, error=str(error))
            return
        structlog.get_logger().info(
            "settings reloaded",
            changed=[change.path for change in result.changes],
            restart_needed=list(result.restart_needed),
        )
