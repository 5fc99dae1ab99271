"""Which instances claim an address, a MAC, or whatever else is to belong to one."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

from imdsproxy.core.model import InstanceId

__all__ = ["Claims"]

_K = TypeVar("_K", bound=Hashable)


class Claims(Generic[_K]):
    """Who claims a key. One claimant is the rule and is stored bare: a set each is dear.

    Attributes:
        contested: The keys that more than one claims.
    """

    __slots__ = ("_claimants", "contested")

    def __init__(self) -> None:
        self._claimants: dict[_K, InstanceId | frozenset[InstanceId]] = {}
        self.contested: set[_K] = set()

    def __iter__(self) -> Iterator[_K]:
        return iter(self._claimants)

    def __len__(self) -> int:
        return len(self._claimants)

    def of(self, key: _K) -> frozenset[InstanceId]:
        """All who claim it."""
        found = self._claimants.get(key)
        if found is None:
            return frozenset()
        return found if isinstance(found, frozenset) else frozenset((found,))

    def replace(self, instance: InstanceId, before: frozenset[_K], after: frozenset[_K]) -> None:
        """Have an instance claim `after`, where it claimed `before`."""
        for key in before - after:
            self._store(key, self.of(key) - {instance})
        for key in after - before:
            self._store(key, self.of(key) | {instance})

    def _store(self, key: _K, claimants: frozenset[InstanceId]) -> None:
        if len(claimants) > 1:
            self._claimants[key] = claimants
            self.contested.add(key)
            return
        self.contested.discard(key)
        if claimants:
            (self._claimants[key],) = claimants
        else:
            self._claimants.pop(key, None)
