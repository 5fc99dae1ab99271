"""What it takes for a changed setting to be in force, and what a reload changed."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Change(StrEnum):
    """What a changed setting takes, from the least to the most."""

    NOTHING = "nothing"
    """The new value is only looked at where it is used next: no running part keeps a copy."""

    LIVE = "live"
    """The controller takes it over at once; no request is disturbed."""

    RELOAD = "reload"
    """HAProxy is reloaded without losing a request."""

    RESTART = "restart"
    """The process concerned has to be started again; until then the old value stays in force."""

    @property
    def rank(self) -> int:
        """0 for `nothing` up to 3 for `restart`: the larger includes the smaller."""
        return list(Change).index(self)


@dataclass(frozen=True, slots=True)
class SettingChange:
    """One setting that a reload found changed; `change` is live, reload, restart or nothing."""

    path: str
    before: object
    after: object
    change: str


@dataclass(frozen=True, slots=True)
class SettingsReload:
    """What `reload` did: which settings it took over, and for which a restart is needed.

    Attributes:
        haproxy_reloaded: HAProxy answers by them.
        pending: Why it does not yet, although it should.
    """

    changes: tuple[SettingChange, ...] = ()
    restart_needed: tuple[str, ...] = ()
    haproxy_reloaded: bool = False
    pending: tuple[str, ...] = ()
