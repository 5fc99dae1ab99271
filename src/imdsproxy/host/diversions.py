"""The table of `imdsproxy.core.diversion`, in force or gone."""

from __future__ import annotations

from typing import ClassVar, Final

from imdsproxy.core.diversion import Diversion, render_diversions
from imdsproxy.host.nft_table import NftTable, NftWords

_WHAT: Final = "cannot lead guests' packets for 169.254.169.254 off their gateway's way"
_UNTIL: Final = "until then guests of bridges must be told the route, by DHCP option 121"


class Diverter(NftTable[tuple[Diversion, ...]]):
    """Leads guests' packets for the metadata address to the cables of their bridges' listeners."""

    words: ClassVar[NftWords] = NftWords(
        missing=_WHAT,
        refused=f"{_WHAT}: nft says",
        until=_UNTIL,
        hint=_UNTIL,
    )

    def render(self, wanted: tuple[Diversion, ...]) -> str:
        """See `NftTable.render`."""
        return render_diversions(self.table, wanted)
