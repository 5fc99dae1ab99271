"""The rule of `imdsproxy.core.arp`, in force or gone."""

from __future__ import annotations

from typing import ClassVar

from imdsproxy.core.arp import render_arp_guard
from imdsproxy.host.nft_table import NftTable, NftWords


class ArpGuard(NftTable[frozenset[str]]):
    """Has the host answer ARP for the metadata address on the given devices only."""

    words: ClassVar[NftWords] = NftWords(
        missing="cannot keep the host from answering ARP for 169.254.169.254 on other devices",
        refused="nft refuses the ARP rule:",
        until="until then guests of other networks may reach the wrong one",
        hint="guests of other networks may reach the wrong one: nft list tables arp",
    )

    def render(self, wanted: frozenset[str]) -> str:
        """See `NftTable.render`."""
        return render_arp_guard(self.table, wanted)
