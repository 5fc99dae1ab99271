"""Fetcher of the user data that items need. User data that a hub does not send never delays the others."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field

from imdsproxy.errors import SourceError, SourceRefused
from imdsproxy.fleet.layout import UserData
from imdsproxy.sources.fleet.client import HubStream


@dataclass(slots=True)
class UserDataFetcher:
    """Fetches user data from a hub and stores it.

    Args:
        keep: Stores user data on disk; raises `SourceError`.
    """

    keep: Callable[[bytes], Awaitable[None]]
    _failures: dict[str, SourceError] = field(default_factory=dict)

    async def fetch(self, stream: HubStream, wanted: Iterable[UserData]) -> None:
        """Fetch user data one after the other, the smallest first."""
        for data in sorted(wanted, key=lambda one: (one.size, one.sha256)):
            try:
                await self.keep(await stream.user_data(data.sha256, data.size))
            except SourceError as error:
                self._failures[data.sha256] = error
            else:
                self._failures.pop(data.sha256, None)

    def reasons(self) -> Mapping[str, str]:
        """Return the reasons of the last failed attempts, by SHA-256."""
        return {
            sha256: f"{error.message} ({error.hint})" if error.hint else error.message
            for sha256, error in self._failures.items()
        }

    def is_refused(self, data: UserData) -> bool:
        """Return whether the last attempt failed for a reason that lasts until an operator acts."""
        return isinstance(self._failures.get(data.sha256), SourceRefused)

    def forget(self, needed: Iterable[UserData]) -> None:
        """Forget the failures of all user data except `needed`."""
        left = {data.sha256 for data in needed}
        for sha256 in self._failures.keys() - left:
            del self._failures[sha256]
