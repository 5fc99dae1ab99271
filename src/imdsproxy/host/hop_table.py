"""The rule that makes hop limits of DSCPs (`core.hop_limit`), in nf_tables of each namespace that needs it.

In nft(8)'s words, where M is the metadata address, for IPv4 (and the same for IPv6, with its hop limit):

    chain output                                  # hook output, before anybody else's
      ip saddr M tcp sport 80 jump limit4         # and 254, behind a gate
    chain limit4
      ip dscp 0 return
      ip dscp 0x2f return                         # a gate's own mark
      ip ttl set (ip dscp)                        # nft(8) has no word for it
      ip dscp set 0
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Final, TypeVar

from imdsproxy.core.gates import ANSWER_DSCP, VERIFIED_PORT
from imdsproxy.core.hop_limit import HopPlace
from imdsproxy.core.hoststate import Family
from imdsproxy.core.model import METADATA_PORT
from imdsproxy.errors import DataplaneError, HostRefused
from imdsproxy.host.namespaces import NamespaceThread
from imdsproxy.host.nftables import (
    FAMILY,
    INET,
    L4_PROTOCOL,
    NETWORK,
    TRANSPORT,
    Batch,
    Hook,
    NetfilterSocket,
    Verdict,
    bitwise,
    compare,
    meta,
    payload,
    replace_bits,
    shift_right,
    store,
    swap_bytes,
    verdict,
)
from imdsproxy.host.nlmessages import NetlinkRefused
from imdsproxy.host.refusal import host_refused

T = TypeVar("T")

_WORDS: Final = "imdsproxy hops 1"
"""Kept with each table: one of another format is made anew."""

_BEFORE_OTHERS: Final = -400
_TCP: Final = bytes((socket.IPPROTO_TCP,))
_WHAT: Final = "limit the hops of answers"
_HINT: Final = "nf_tables with family inet is needed; until then guests with a hop_limit get no session token there"
_NO_TABLES: Final = (errno.EOPNOTSUPP, errno.EPROTONOSUPPORT, errno.ENOENT, errno.EINVAL)


@dataclass(slots=True)
class KernelHops:
    """Speaks to nf_tables where it is needed.

    Args:
        thread: Where namespaces are entered.
        table: The kernel's name for it, ours alone.
    """

    thread: NamespaceThread
    table: str

    async def open(self, places: Iterable[HopPlace]) -> dict[HopPlace, DataplaneError | None]:
        """Have the rule there; one that is as it should be stays as it is."""
        given = tuple(places)
        return await self.thread.run(lambda: {one: self._try_open(one) for one in given})

    def _try_open(self, place: HopPlace) -> DataplaneError | None:
        try:
            found = self._at(place, self._open)
        except (OSError, DataplaneError) as error:
            if isinstance(error, DataplaneError):
                return error
            return host_refused(_WHAT, error, hint=_HINT)
        if found is None:
            name = "" if place is None else place.name
            return HostRefused(f"cannot {_WHAT}: namespace {name} is gone")
        return None

    def _open(self) -> bool:
        with NetfilterSocket() as channel:
            present = channel.words(self.table, INET)
            if present == _WORDS:
                return True
            batch = Batch(self.table, INET)
            if present is not None:
                batch.drop_table()
            batch.make_table(_WORDS)
            fill_table(batch)
            channel.commit(batch)
        return True

    async def present(self, names: Collection[str | None]) -> frozenset[HopPlace]:
        """Which of these namespaces (`None`: the host's own) have the rule."""
        if not names:
            return frozenset()

        def look() -> frozenset[HopPlace]:
            found = {name: self._place(name) for name in names}
            places = {one for name, one in found.items() if name is None or one is not None}
            return frozenset(one for one in places if self._is_there(one))

        return await self.thread.run(look)

    def _place(self, name: str | None) -> HopPlace:
        return None if name is None else self.thread.directory.identity(name)

    def _is_there(self, place: HopPlace) -> bool:
        def words() -> bool:
            with NetfilterSocket() as channel:
                return channel.words(self.table, INET) == _WORDS

        try:
            return self._at(place, words) is True
        except (OSError, DataplaneError):
            return False

    async def close(self, names: Collection[str | None]) -> None:
        """Have no rule in these namespaces (`None`: the host's own).

        Raises:
            HostRefused: The kernel refuses.
        """
        for name in names:
            if name is None:
                await self.thread.run(self._drop)
            else:
                await self.thread.inside(name, lambda _: self._drop())

    def _drop(self) -> None:
        batch = Batch(self.table, INET)
        batch.drop_table()
        try:
            with NetfilterSocket() as channel:
                channel.commit(batch)
        except NetlinkRefused as error:
            # A kernel without such tables has none.
            if error.errno not in _NO_TABLES:
                raise host_refused(f"remove table inet {self.table}", error) from error

    def _at(self, place: HopPlace, work: Callable[[], T]) -> T | None:
        if place is None:
            return work()
        if self.thread.directory.identity(place.name) != place:
            return None
        found = self.thread.enter(place.name, lambda _: (work(),))
        return None if found is None else found[0]


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where things are in a family's header.

    Attributes:
        protocol: The family's number (`NFPROTO_IPV4`, `NFPROTO_IPV6`).
        source: Where the source address is.
        dscp: Mask for the DSCP in the header's first two bytes.
        bits: How far it is above the lowest bit of these.
        limit: Where the two bytes are that have TTL and protocol, or next header and hop limit.
        word: Makes these two of the header, with the DSCP as the limit.
        checksum: Where the header's is, if it has one.
    """

    family: Family
    protocol: int
    source: int
    dscp: bytes
    bits: int
    limit: int
    word: bytes
    checksum: int | None


_LAYOUTS: Final = (
    _Layout(
        Family.IPV4,
        protocol=2,
        source=12,
        dscp=b"\x00\xfc",
        bits=2,
        limit=8,
        # A checksum can be mended by two bytes only, and what is TCP is known.
        word=payload(NETWORK, 1, 1) + shift_right(2) + replace_bits(b"\x3f\x00", b"\x00" + _TCP),
        checksum=10,
    ),
    _Layout(
        Family.IPV6,
        protocol=10,
        source=8,
        dscp=b"\x0f\xc0",
        bits=6,
        limit=6,
        word=payload(NETWORK, 0, 2)
        + (swap_bytes() + shift_right(6) + swap_bytes())
        + replace_bits(b"\x00\x3f", _TCP + b"\x00"),
        checksum=None,
    ),
)


def fill_table(batch: Batch) -> None:
    """Put chains and rules into a table that is new."""
    batch.make_base_chain("output", Hook.OUTPUT, _BEFORE_OTHERS)
    for layout in _LAYOUTS:
        chain = f"limit{layout.family.value}"
        address = layout.family.metadata_address.packed
        batch.make_chain(chain)
        for port in (METADATA_PORT, VERIFIED_PORT):
            batch.make_rule(
                "output",
                meta(FAMILY) + compare(bytes((layout.protocol,))),
                meta(L4_PROTOCOL) + compare(_TCP),
                payload(NETWORK, layout.source, len(address)) + compare(address),
                payload(TRANSPORT, 0, 2) + compare(struct.pack(">H", port)),
                verdict(Verdict.JUMP, chain),
            )
        _limit(batch, chain, layout)


def _limit(batch: Batch, chain: str, layout: _Layout) -> None:
    head = payload(NETWORK, 0, 2)
    for ours in (0, ANSWER_DSCP):
        is_it = bitwise(layout.dscp) + compare(struct.pack(">H", ours << layout.bits))
        batch.make_rule(chain, head, is_it, verdict(Verdict.RETURN))
    batch.make_rule(chain, layout.word, store(NETWORK, layout.limit, 2, checksum=layout.checksum))
    rest = bytes(0xFF ^ byte for byte in layout.dscp)
    batch.make_rule(chain, head, bitwise(rest), store(NETWORK, 0, 2, checksum=layout.checksum))
