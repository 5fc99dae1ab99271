"""`ADDRESS:PORT` of the host, as the metrics settings take it."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address

_MAX_PORT = 65535


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A numeric address and a TCP port; `str` gives `127.0.0.1:9465` or `[::1]:9465`."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_endpoint(text: str) -> Endpoint:
    """Read `ADDRESS:PORT` or `[ADDRESS]:PORT`.

    Link-local addresses are the guests' (169.254.169.254 is one), a wildcard would answer on the
    interfaces that listeners sit on: neither can keep operators' figures away from guests.

    Raises:
        ValueError: What is wrong, in words for the operator.
    """
    host, separator, port = text.rpartition(":")
    if not separator or not (port.isascii() and port.isdigit()):
        raise ValueError("has no port")
    if not 0 < int(port) <= _MAX_PORT:
        raise ValueError(f"{port} is not a TCP port")
    bracketed = host.startswith("[") and host.endswith("]")
    try:
        address = ip_address(host[1:-1] if bracketed else host)
    except ValueError:
        raise ValueError(f"{host!r} is not an IP address") from None
    if isinstance(address, IPv6Address) != bracketed:
        raise ValueError("an IPv6 address stands in brackets, an IPv4 address does not")
    if address.is_link_local:
        raise ValueError(f"{address} is link-local: guests could reach it")
    if address.is_unspecified:
        raise ValueError(f"{address} listens everywhere: guests could reach it")
    if address.is_multicast:
        raise ValueError(f"{address} is a multicast address")
    return Endpoint(str(address), int(port))
