"""Addresses of guests: their normal form, and the link-local address of a MAC."""

from ipaddress import IPv4Address, IPv6Address
from typing import Final

from imdsproxy.model.entities import IpAddress, MacAddress

_LINK_LOCAL_PREFIX: Final = 0xFE80 << 112
_UNIVERSAL_BIT: Final = 1 << 57
_FILLER: Final = 0xFFFE
_IPV6: Final = 1 << 128


def to_number(address: IpAddress) -> int:
    """Return an address of either family as one number, which takes a fifth of the memory."""
    return int(address) if isinstance(address, IPv4Address) else int(address) | _IPV6


def from_number(number: int) -> IpAddress:
    return IPv6Address(number ^ _IPV6) if number & _IPV6 else IPv4Address(number)


def text_of(address: IpAddress) -> str:
    """Return `str` of a normalised address, four times as fast for a MAC's link-local address."""
    number = int(address)
    if number >> 64 != _LINK_LOCAL_PREFIX >> 64 or number >> 24 & 0xFFFF != _FILLER:
        return str(address)
    first, *rest = (number >> shift & 0xFFFF for shift in (48, 32, 16, 0))
    start = f"fe80::{first:x}" if first else "fe80:"
    return f"{start}:{rest[0]:x}:{rest[1]:x}:{rest[2]:x}"


def normalise_address(address: IpAddress) -> IpAddress:
    """Return the normal form of an address: IPv4 for an IPv4-mapped address, and no scope (zone).

    A dual-stack socket reports an IPv4 peer as `::ffff:10.0.0.5`, and a link-local peer as `fe80::1%eth0`.
    """
    if isinstance(address, IPv4Address):
        return address
    mapped = address.ipv4_mapped
    if mapped is not None:
        return mapped
    return address if address.scope_id is None else IPv6Address(int(address))


def link_local_of(mac: MacAddress) -> IPv6Address:
    """Return the link-local address of a MAC by modified EUI-64 (RFC 4291 appendix A)."""
    octets = int(mac.replace(":", ""), 16)
    high, low = octets >> 24, octets & 0xFFFFFF
    identifier = (high << 40 | _FILLER << 24 | low) ^ _UNIVERSAL_BIT
    return IPv6Address(_LINK_LOCAL_PREFIX | identifier)


def mac_of(address: IpAddress) -> MacAddress | None:
    """Return the MAC inside a modified EUI-64 link-local address, or `None` for any other address.

    A random link-local address has the filler `fffe` once in 65,536 times: the result hints at the interface's MAC and
    does not prove it.
    """
    if isinstance(address, IPv4Address) or int(address) >> 64 != _LINK_LOCAL_PREFIX >> 64:
        return None
    identifier = int(address) & 0xFFFF_FFFF_FFFF_FFFF
    if identifier >> 24 & 0xFFFF != _FILLER:
        return None
    identifier ^= _UNIVERSAL_BIT
    octets = (identifier >> 40 << 24 | identifier & 0xFFFFFF).to_bytes(6, "big")
    return MacAddress(octets.hex(":"))
