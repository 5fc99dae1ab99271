"""What it takes for a changed setting to be in force: declared beside each field of the schema."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["Change"]


class Change(StrEnum):
    """What a changed setting takes, from the least to the most."""

    NOTHING = "nothing"
    """The new value is only looked at where it is used next: no running part keeps a copy."""

    LIVE = "live"
    """The controller takes it over at once; nobody notices."""

    RELOAD = "reload"
    """HAProxy is reloaded without losing a request."""

    RESTART = "restart"
    """The process concerned has to be started again; until then the old value stays in force."""

    @property
    def rank(self) -> int:
        """0 for `nothing` up to 3 for `restart`: the larger includes the smaller."""
        return list(Change).index(self)
