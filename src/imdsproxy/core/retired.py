"""Token epochs of instances that are gone, in a fixed space. Pure.

A token is good in its instance's epoch only. So an instance that comes again under its id must not get an epoch that it
had before, whatever the host's clock says by then. To keep each id would take space for ever. A Bloom filter of fixed
size says of an id that it is not retired, or that it may be. In the second case the instance has an epoch above all
that were ever retired. An instance for which the filter is wrong gets that epoch too, which does no harm.
"""

import base64
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Self

from imdsproxy.core.policy import UNTOUCHED, OperatorOverride

_BYTES: Final = 8192
"""The filter is wrong about one id in a hundred after 5,000 retired ones."""

_BITS_OF_AN_ID: Final = 3
_MOST_KEPT: Final = 1_000
"""Overrides of instances that are gone, before they are retired."""


@dataclass(frozen=True, slots=True)
class Retired:
    """The retired instances.

    Attributes:
        epoch: Of each that comes again; above all that they had.
        bits: The filter; empty while there are none.
    """

    epoch: int = 0
    bits: bytes = b""

    def override(self, instance: str) -> OperatorOverride:
        """Return what is in force for an instance without an override of its own."""
        if not self.bits or not all(self.bits[at] & bit for at, bit in _places(instance)):
            return UNTOUCHED
        return OperatorOverride(self.epoch)

    def render(self) -> list[object]:
        """Return the reverse of `parse_retired`."""
        return [self.epoch, base64.b64encode(self.bits).decode()]


_NOBODY: Final = Retired()


@dataclass(frozen=True, slots=True)
class Overrides(Mapping[str, OperatorOverride]):
    """What operators did, by instance; a retired instance, which is not listed, has one too.

    Attributes:
        listed: By instance.
    """

    listed: Mapping[str, OperatorOverride] = field(default_factory=dict)
    retired: Retired = _NOBODY

    def __getitem__(self, instance: str) -> OperatorOverride:
        """Return what is in force for an instance."""
        found = self.listed.get(instance) or self.retired.override(instance)
        if instance not in self.listed and found == UNTOUCHED:
            raise KeyError(instance)
        return found

    def __iter__(self) -> Iterator[str]:
        """Iterate over listed instances."""
        return iter(self.listed)

    def __len__(self) -> int:
        """Return how many instances are listed."""
        return len(self.listed)

    def replace(self, instance: str, override: OperatorOverride) -> Self:
        """Return these with another override of an instance."""
        return replace(self, listed={**self.listed, instance: override})

    def retire(self, here: Iterable[str]) -> Self:
        """Return these without instances that are gone, once there are many of them.

        No instance that is here gets another epoch by that.

        Args:
            here: Every instance that a source reports.
        """
        present = frozenset(here)
        gone = {name: one for name, one in self.listed.items() if name not in present}
        if len(gone) <= _MOST_KEPT:
            return self
        bits = bytearray(self.retired.bits or bytes(_BYTES))
        for at, bit in (place for name in gone for place in _places(name)):
            bits[at] |= bit
        last = max(self.retired.epoch, *(one.epoch for one in gone.values()))
        after = Retired(last + 1, bytes(bits))
        kept = {name: one for name, one in self.listed.items() if name in present}
        for name in present - kept.keys():
            before = self.retired.override(name)
            if after.override(name) != before:
                kept[name] = before
        return replace(self, listed=kept, retired=after)


def parse_retired(value: object) -> Retired:
    """Return the retired instances out of a file.

    Raises:
        ValueError: There is something else.
    """
    match value:
        case [int(epoch), str(text)] if epoch >= 0:
            bits = base64.b64decode(text, validate=True)
            if len(bits) in (0, _BYTES):
                return Retired(epoch, bits)
    raise ValueError("the retired instances are something else than an epoch and a filter")


def _places(instance: str) -> Iterator[tuple[int, int]]:
    """Byte and bit of the filter, of each bit that stands for an instance."""
    digest = hashlib.blake2b(
        instance.encode(errors="surrogatepass"), digest_size=_BITS_OF_AN_ID * 4
    ).digest()
    for at in range(0, len(digest), 4):
        number = int.from_bytes(digest[at : at + 4])
        yield number // 8 % _BYTES, 1 << number % 8
