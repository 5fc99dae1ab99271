"""The table of `imdsproxy.core.diversion`, in force or gone."""

from __future__ import annotations

import asyncio
import subprocess
from dataclasses import dataclass

from imdsproxy.core.diversion import Diversion, render_diversions
from imdsproxy.errors import HostRefused

__all__ = ["Diverter"]

_WHAT = "cannot lead guests' packets for 169.254.169.254 off their gateway's way"
_HINT = "until then guests of bridges must be told the route, by DHCP option 121"


@dataclass(slots=True)
class Diverter:
    """Speaks to nftables, only when something is to be changed.

    Attributes:
        table: The name of our table.
        program: nft(8).
        applied: What is in force; `None` while nobody knows what an earlier process left.
    """

    table: str
    program: str = "nft"
    applied: tuple[Diversion, ...] | None = None

    async def apply(self, diversions: tuple[Diversion, ...]) -> None:
        """Have exactly these in force; with none, no table at all.

        Raises:
            HostRefused: nft is not installed or refuses.
        """
        if diversions == self.applied:
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
            if not diversions and self.applied is None:
                # Without the program nobody can have made the table.
                self.applied = diversions
                return
            raise HostRefused(f"{_WHAT}: no nft", hint=f"apt install nftables; {_HINT}") from error
        # A kernel that knows no such tables refuses to remove one as well: then there is none.
        _, words = await process.communicate(render_diversions(self.table, diversions).encode())
        if process.returncode != 0 and (diversions or self.applied):
            said = words.decode("utf-8", "replace").strip()[:500]
            raise HostRefused(f"{_WHAT}: nft says {said}", hint=_HINT)
        self.applied = diversions
