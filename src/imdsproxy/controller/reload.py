"""Reload of the settings while guests are served."""

import asyncio
from dataclasses import replace
from typing import Final

import structlog

from imdsproxy.config.changes import SettingsReload
from imdsproxy.config.schema import Settings
from imdsproxy.controller.in_force import UNCONFIRMED
from imdsproxy.controller.parts import Parts
from imdsproxy.errors import ImdsproxyError
from imdsproxy.haproxy.process import link_jail_to_itself
from imdsproxy.nova.routing import changed_secrets
from imdsproxy.reconcile.part import Impact, list_problems

_TAKE_OVER_S: Final = 10.0
_log: Final = structlog.get_logger()


async def reload_settings(parts: Parts, *, allow_dropped: bool) -> SettingsReload:
    """Read the settings again; apply all that can change live or by a reload of HAProxy.

    Return once guests get answers by the new settings: an operator who gives a Nova its next secret must know when. If
    that takes long, `pending` has the reasons.
    """
    result, taken_over = _begin(parts, allow_dropped=allow_dropped)
    if taken_over is None or (await asyncio.wait([taken_over], timeout=_TAKE_OVER_S))[0]:
        return result
    problems = list_problems(parts.all(), Impact.DELAYS, Impact.HARMS)
    reasons = dict.fromkeys(problem.reason for problem in problems)
    return replace(result, haproxy_reloaded=False, pending=(UNCONFIRMED, *reasons))


def on_sighup(parts: Parts) -> None:
    """Handle SIGHUP like `imdsproxy reload`, with the result in the log."""
    try:
        result, _ = _begin(parts)
    except ImdsproxyError as error:
        _log.error("settings not reloaded", code=error.code, error=str(error))
        return
    changed, restart_needed = [one.path for one in result.changes], list(result.restart_needed)
    _log.info("settings reloaded", changed=changed, restart_needed=restart_needed)


def _begin(
    parts: Parts, *, allow_dropped: bool = False
) -> tuple[SettingsReload, asyncio.Task[None] | None]:
    holder, nova = parts.holder, parts.nova
    parts.notifier.reloading(int(parts.clock.monotonic() * 1e6))
    backends, routing = nova.backends(), nova.routing
    records = keys = False

    def accept(after: Settings) -> tuple[str, ...]:
        nonlocal records, keys
        if after.limits.enabled:
            link_jail_to_itself(parts.layout.jail)
        records, keys = parts.policy_store.read(after)
        # Nova's signatures and the region are part of every compiled record.
        records |= nova.read(after.nova)
        records |= after.documents.region != holder.settings.documents.region
        contents = changed_secrets(routing, nova.routing)
        return (*contents, "tokens.key_file") if keys else contents

    try:
        result = holder.reload(accept, allow_dropped=allow_dropped)
    finally:
        parts.notifier.ready()
    if nova.backends() != backends:
        # HAProxy also reloads if only the content of a file in the settings has changed.
        result = replace(result, haproxy_reloaded=True)
    if not (records or keys or result.haproxy_reloaded):
        return result, None
    ticket = parts.records.resync() if records else None
    task = asyncio.get_running_loop().create_task(_take_over(parts, ticket, keys=keys))
    parts.background.add(task)
    task.add_done_callback(parts.background.discard)
    return result, task


async def _take_over(parts: Parts, ticket: int | None, *, keys: bool) -> None:
    if keys:
        await parts.policy_store.keys.confirmed()
    # The records come first: new rules may require another signature, or another set.
    if ticket is not None:
        await parts.records.tickets.wait(ticket)
    await parts.nova.resolve()
    await parts.listeners.tickets.wait(parts.touch("settings changed"))
