"""What records depend on: compiled documents and sets of path rules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from imdsproxy.core.compiled import CompiledRecord
from imdsproxy.core.model import InstanceId
from imdsproxy.core.path_rules import PathRules

__all__ = ["CompiledFiles", "NoSets", "SetKeeper"]


class CompiledFiles(Protocol):
    """Where the document server reads from."""

    def apply(self, instance: InstanceId, record: CompiledRecord) -> None:
        """Have exactly this record on disk; `HostRefused` leaves the one before."""
        ...

    def remove(self, instance: InstanceId) -> None:
        """Have no record and no password of the instance."""
        ...

    def instances(self) -> Iterable[InstanceId]:
        """Every instance that has a record on disk."""
        ...


class SetKeeper(Protocol):
    """Who has HAProxy know path rules (`app.rule_sets`)."""

    def prime(self, wanted: Mapping[str, PathRules]) -> None:
        """Have these where a HAProxy finds them that is yet to start.

        Raises:
            HostRefused: The file system refuses.
        """
        ...

    async def have(self, wanted: Mapping[str, PathRules], *, sweep: bool) -> None:
        """Return once every worker knows these, and every one to come; with `sweep` take others away.

        Raises:
            DataplaneError: Some may not know them.
        """
        ...


class NoSets:
    """Nobody does, and nobody has one."""

    def prime(self, wanted: Mapping[str, PathRules]) -> None:
        """See `SetKeeper.prime`."""

    async def have(self, wanted: Mapping[str, PathRules], *, sweep: bool) -> None:
        """See `SetKeeper.have`."""
