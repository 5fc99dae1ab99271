"""Token epochs of instances that no longer exist, in a fixed space. Pure.

A token is valid only in its instance's epoch. If an instance with the same id appears again, it must not get an epoch
that it had before, whatever the host's clock shows by then. A list of all ids would grow for ever. A Bloom filter of
fixed size tells that an id was not retired, or that it may have been. In the second case the instance gets an epoch
above all that were ever retired. An instance with a false positive gets that epoch too, which does no harm.
"""

import base64
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Self

from imdsproxy.model.policy import UNTOUCHED, OperatorOverride

_BYTES: Final = 8192
"""Size of the filter: false for one id in a hundred after 5,000 retired ids."""

_BITS_OF_AN_ID: Final = 3
_MOST_KEPT: Final = 1_000
"""Maximum number of overrides of instances that no longer exist; above it these are retired."""


@dataclass(frozen=True, slots=True)
class Retired:
    """Filter of the retired instances; no bits while there are none.

    An instance that appears again has `epoch`, which is above all epochs that were ever retired.
    """

    epoch: int = 0
    bits: bytes = b""

    def override(self, instance: str) -> OperatorOverride:
        """Return the override in force for an instance without an override of its own."""
        if not self.bits or not all(self.bits[at] & bit for at, bit in _places(instance)):
            return UNTOUCHED
        return OperatorOverride(self.epoch)

    def render(self) -> list[object]:
        return [self.epoch, base64.b64encode(self.bits).decode()]


_EMPTY: Final = Retired()


@dataclass(frozen=True, slots=True)
class Overrides(Mapping[str, OperatorOverride]):
    """Operators' overrides by instance; a retired instance, which is not listed, has one too."""

    listed: Mapping[str, OperatorOverride] = field(default_factory=dict)
    retired: Retired = _EMPTY

    def __getitem__(self, instance: str) -> OperatorOverride:
        found = self.listed.get(instance) or self.retired.override(instance)
        if instance not in self.listed and found == UNTOUCHED:
            raise KeyError(instance)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.listed)

    def __len__(self) -> int:
        return len(self.listed)

    def replace(self, instance: str, override: OperatorOverride) -> Self:
        return replace(self, listed={**self.listed, instance: override})

    def retire(self, here: Iterable[str]) -> Self:
        """Return the overrides without instances that no longer exist, once there are many such instances.

        The epochs of existing instances do not change.
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
    """Parse the retired instances from a file's value; raise `ValueError` if the value has another form."""
    match value:
        case [int(epoch), str(text)] if epoch >= 0:
            bits = base64.b64decode(text, validate=True)
            if len(bits) in (0, _BYTES):
                return Retired(epoch, bits)
    raise ValueError("the retired instances are not an epoch and a filter")


def _places(instance: str) -> Iterator[tuple[int, int]]:
    """Yield byte and bit of the filter for each bit that represents an instance."""
    digest = hashlib.blake2b(
        instance.encode(errors="surrogatepass"), digest_size=_BITS_OF_AN_ID * 4
    ).digest()
    for at in range(0, len(digest), 4):
        number = int.from_bytes(digest[at : at + 4])
        yield number // 8 % _BYTES, 1 << number % 8
