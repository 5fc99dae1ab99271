"""A table of ours, made and removed as a whole by nft(8)."""

from __future__ import annotations

import asyncio
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

from imdsproxy.errors import HostRefused

__all__ = ["NftTable", "NftWords"]

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
            HostRefused: nft is not installed or refuses.
        """
        if wanted == self.applied:
            return
        try:
            process = await asyncio.create_subprocess_exec(
                self.program,
                "-f",
                "-",
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
        except FileNotFoundError as error:
            if not wanted and self.applied is None:
                # Without the program nobody can have made the table.
                self.applied = wanted
                return
            raise HostRefused(
                f"{self.words.missing}: no nft", hint=f"apt install nftables; {self.words.until}"
            ) from error
        # A kernel that knows no such tables refuses to remove one as well: then there is none.
        _, said = await process.communicate(self.render(wanted).encode())
        if process.returncode != 0 and (wanted or self.applied):
            told = said.decode("utf-8", "replace").strip()[:500]
            raise HostRefused(f"{self.words.refused} {told}", hint=self.words.hint)
        self.applied = wanted
