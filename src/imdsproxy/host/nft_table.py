"""A table of ours, made and removed as a whole by nft(8)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Final, Generic, TypeVar

from imdsproxy.errors import HostRefused
from imdsproxy.host.programs import run_program

_DEADLINE_S: Final = 30.0

T = TypeVar("T", bound=Collection[object])


@dataclass(frozen=True, slots=True)
class NftWords:
    """What an operator is told.

    Attributes:
        missing: Where there is no nft(8): what cannot be done.
        refused: What stands before nft's own words.
        until: What is so until nft(8) is installed.
        hint: For when nft refuses.
    """

    missing: str
    refused: str
    until: str
    hint: str


@dataclass(slots=True)
class NftTable(ABC, Generic[T]):
    """Speaks to nftables, only when something is to be changed.

    Attributes:
        table: The name of our table.
        program: nft(8).
        applied: What is in force; `None` while nobody knows what an earlier process left.
    """

    words: ClassVar[NftWords]

    table: str
    program: str = "nft"
    applied: T | None = None

    @abstractmethod
    def render(self, wanted: T) -> str:
        """A script that replaces the table at once; with nothing wanted it only removes it."""

    async def apply(self, wanted: T) -> None:
        """Have exactly this in force; with nothing wanted, no table at all.

        Raises:
            HostRefused: nft is not installed, refuses, or hangs.
        """
        if wanted == self.applied:
            return
        try:
            # A kernel that knows no such tables refuses to remove one as well: then there is none.
            status, words = await run_program(
                self.program, "-f", "-", deadline_s=_DEADLINE_S, text=self.render(wanted)
            )
        except FileNotFoundError as error:
            if not wanted and self.applied is None:
                # Without the program nobody can have made the table.
                self.applied = wanted
                return
            raise HostRefused(
                f"{self.words.missing}: no nft", hint=f"apt install nftables; {self.words.until}"
            ) from error
        if status != 0 and (wanted or self.applied):
            raise HostRefused(f"{self.words.refused} {words[:500]}", hint=self.words.hint)
        self.applied = wanted
