"""Who keeps what records depend on: compiled documents, pairs of address and MAC, hop limits, sets of path rules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from imdsproxy.core.compiled import CompiledRecord
from imdsproxy.core.model import InstanceId, NetworkId
from imdsproxy.core.observation import AddressKey
from imdsproxy.core.pairs import Pairs
from imdsproxy.core.path_rules import PathRules

__all__ = ["CompiledFiles", "HopKeeper", "NoHops", "NoPairs", "NoSets", "PairKeeper", "SetKeeper"]


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


class PairKeeper(Protocol):
    """Who lets addresses through to HAProxy's maps, by their MACs (`app.gates`)."""

    def keys(self) -> Iterable[AddressKey]:
        """Every address that has a pair."""
        ...

    def prime(self, pairs: Pairs, *, complete: bool) -> None:
        """Whom to let through beside those said before, before HAProxy runs, and whether nobody else is."""
        ...

    def withheld(self, pairs: Pairs) -> frozenset[AddressKey]:
        """Addresses that HAProxy must not know yet, because nobody looks at their MACs."""
        ...

    def differing(self, pairs: Pairs) -> Pairs:
        """Those that are not in force as they are here."""
        ...

    async def withdraw(self, pairs: Pairs) -> None:
        """Let nobody through any more who is not in `pairs` for an address that is.

        Raises:
            HostRefused: The kernel refuses.
        """
        ...

    async def grant(self, pairs: Pairs) -> None:
        """Let these through.

        Raises:
            HostRefused: The kernel refuses.
        """
        ...


class NoPairs:
    """Nobody looks at MACs."""

    def keys(self) -> Iterable[AddressKey]:
        """See `PairKeeper.keys`."""
        return ()

    def prime(self, pairs: Pairs, *, complete: bool) -> None:
        """See `PairKeeper.prime`."""

    def withheld(self, pairs: Pairs) -> frozenset[AddressKey]:
        """See `PairKeeper.withheld`."""
        del pairs
        return frozenset()

    def differing(self, pairs: Pairs) -> Pairs:
        """See `PairKeeper.differing`."""
        del pairs
        return {}

    async def withdraw(self, pairs: Pairs) -> None:
        """See `PairKeeper.withdraw`."""

    async def grant(self, pairs: Pairs) -> None:
        """See `PairKeeper.grant`."""


class HopKeeper(Protocol):
    """Who sees to hop limits (`app.hops`)."""

    def word(self, network: NetworkId, word: str) -> str:
        """A policy word as it may be in force now."""
        ...

    def hold(self, wanted: dict[str, str | None]) -> frozenset[NetworkId]:
        """Change map values that cannot be in force yet; `settled` wants what this gives."""
        ...

    def settled(self, armed: frozenset[NetworkId], *, complete: bool) -> None:
        """What was held is in force; with `complete` all records have been by now."""
        ...


class NoHops:
    """Nobody does, and nobody has one."""

    def word(self, network: NetworkId, word: str) -> str:
        """See `HopKeeper.word`."""
        del network
        return word

    def hold(self, wanted: dict[str, str | None]) -> frozenset[NetworkId]:
        """See `HopKeeper.hold`."""
        del wanted
        return frozenset()

    def settled(self, armed: frozenset[NetworkId], *, complete: bool) -> None:
        """See `HopKeeper.settled`."""


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
