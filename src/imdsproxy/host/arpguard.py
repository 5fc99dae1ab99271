"""The rule of `imdsproxy.core.arp`, in force or gone."""

from __future__ import annotations

import asyncio
import subprocess
from dataclasses import dataclass

from imdsproxy.core.arp import render_arp_guard
from imdsproxy.errors import HostRefused

__all__ = ["ArpGuard"]


@dataclass(slots=True)
class ArpGuard:
    """Speaks to nftables, only when something is to be changed.

    Attributes:
        table: The name of our table.
        program: nft(8).
        applied: What the rule names; `None` while nobody knows what an earlier process left.
    """

    table: str
    program: str = "nft"
    applied: frozenset[str] | None = None

    async def apply(self, devices: frozenset[str]) -> None:
        """Have the host answer ARP for the metadata address on these devices only; with none, no rule at all.

        Raises:
            HostRefused: nft is not installed or refuses.
        """
        if devices == self.applied:
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
            if not devices and self.applied is None:
                # Without the program nobody can have made the rule.
                self.applied = devices
                return
            raise HostRefused(
                "cannot keep the host from answering ARP for 169.254.169.254 on other devices: no nft",
                hint="apt install nftables; until then guests of other networks may reach the wrong one",
            ) from error
        # A kernel that knows no such tables refuses to remove one as well: then there is none.
        _, words = await process.communicate(render_arp_guard(self.table, devices).encode())
        if process.returncode != 0 and (devices or self.applied):
            raise HostRefused(
                f"nft refuses the ARP rule: {words.decode('utf-8', 'replace').strip()[:500]}",
                hint="guests of other networks may reach the wrong one: nft list tables arp",
            )
        self.applied = devices
