"""Tables of ours that nft(8) replaces and removes as a whole; their scripts are in `listeners.nft_scripts`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Final, Generic, TypeVar

from imdsproxy.errors import HostRefused
from imdsproxy.host.process import run_program
from imdsproxy.listeners.nft_scripts import Diversion, render_arp_guard, render_diversions

_DEADLINE_S: Final = 30.0

T = TypeVar("T", bound=Collection[object])


@dataclass(slots=True)
class NftTable(ABC, Generic[T]):
    """Runs nft(8), only when something is to be changed.

    Attributes:
        failing: What cannot be done without nft(8), or when it refuses.
        until: What holds until then, for the hint.
        table: The name of our table.
        program: nft(8).
        applied: What is in force; `None` while what an earlier process left is unknown.
    """

    failing: ClassVar[str]
    until: ClassVar[str]

    table: str
    program: str = "nft"
    applied: T | None = None

    @abstractmethod
    def render(self, wanted: T) -> str:
        """A script that replaces the table at once; with nothing wanted it only removes it."""

    async def apply(self, wanted: T) -> None:
        """Put exactly this in force; with nothing wanted, remove the table.

        Raises:
            HostRefused: nft is not installed, refuses, or hangs.
        """
        if wanted == self.applied:
            return
        try:
            # A kernel that knows no such tables refuses to remove one as well: then there is none.
            status, output = await run_program(
                self.program, "-f", "-", deadline_s=_DEADLINE_S, text=self.render(wanted)
            )
        except FileNotFoundError as error:
            if not wanted and self.applied is None:
                # Without the program there can be no table.
                self.applied = wanted
                return
            raise HostRefused(
                f"{self.failing}: no nft", hint=f"apt install nftables; {self.until}"
            ) from error
        if status != 0 and (wanted or self.applied):
            raise HostRefused(f"{self.failing}: nft refuses: {output[:500]}", hint=self.until)
        self.applied = wanted


class ArpGuard(NftTable[frozenset[str]]):
    """Makes the host answer ARP for the metadata address on the given devices only."""

    failing = "cannot keep the host from answering ARP for 169.254.169.254 on other devices"
    until = "until then guests of other networks may reach the wrong one: nft list tables arp"

    def render(self, wanted: frozenset[str]) -> str:
        """See `NftTable.render`."""
        return render_arp_guard(self.table, wanted)


class Diverter(NftTable[tuple[Diversion, ...]]):
    """Redirects guests' packets for the metadata address to the veth of their bridge's listener."""

    failing = "cannot redirect guests' packets for 169.254.169.254 that go to their gateway"
    until = "until then guests of bridges need a route, by DHCP option 121"

    def render(self, wanted: tuple[Diversion, ...]) -> str:
        """See `NftTable.render`."""
        return render_diversions(self.table, wanted)
