"""The parts of a running controller, for those that are made of several of them."""

from __future__ import annotations

from dataclasses import dataclass

from imdsproxy.anti_spoofing.hop_limits import HopLimits
from imdsproxy.anti_spoofing.mac_filters import MacFilters
from imdsproxy.app.audit import Audit
from imdsproxy.app.companion import Companion
from imdsproxy.app.document_probe import DocumentProbe
from imdsproxy.app.guard import HaproxyGuard
from imdsproxy.app.guarding import Guarding
from imdsproxy.app.lookup import Lookup
from imdsproxy.app.record_loop import RecordLoop
from imdsproxy.app.settings_reload import SettingsHolder
from imdsproxy.app.token_report import TokenCounting
from imdsproxy.app.watching import Watching
from imdsproxy.controller.build import Sources
from imdsproxy.core.inventory import Inventory
from imdsproxy.dataplane.haproxy import Haproxy
from imdsproxy.dataplane.layout import Layout
from imdsproxy.host.clock import Clock
from imdsproxy.listeners.loop import ListenerLoop
from imdsproxy.nova.upstream import NovaUpstream
from imdsproxy.serving.resolver import Resolver

__all__ = ["Parts"]


@dataclass(frozen=True, slots=True)
class Parts:
    """All that it takes to serve guests that are known.

    Attributes:
        haproxy_version: Of the program that is installed.
        started_at: When this controller started, Unix time.
        started: The same by the monotonic clock.
    """

    holder: SettingsHolder
    layout: Layout
    clock: Clock
    sources: Sources
    inventory: Inventory
    records: RecordLoop
    listeners: ListenerLoop
    mac_filters: MacFilters
    hop_limits: HopLimits
    haproxy: Haproxy
    haproxy_version: str
    guard: HaproxyGuard
    companion: Companion
    documents: DocumentProbe
    lookup: Lookup
    resolver: Resolver
    nova: NovaUpstream
    guarding: Guarding
    watching: Watching
    audit: Audit
    counting: TokenCounting
    started_at: float
    started: float
