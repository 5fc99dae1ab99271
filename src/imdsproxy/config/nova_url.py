"""Where a Nova metadata API listens, as its URL says."""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final, Literal
from urllib.parse import urlsplit

NOVA_METADATA_PORT: Final = 8775
"""Nova's default `metadata_listen_port` (nova/conf/api.py)."""

_NAME: Final = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)(?:\.(?!-)[A-Za-z0-9-]{1,63}(?<!-))*\.?")
_NAME_LENGTH: Final = 253
_ADDRESS_V4: Final = re.compile(r"[0-9.]+")
_ITSELF: Final = frozenset({"169.254.169.254", "fe80::a9fe:a9fe"})


@dataclass(frozen=True, slots=True)
class NovaUrl:
    """Scheme, host (a name, IPv4, or IPv6 without brackets) and TCP port."""

    scheme: Literal["http", "https"]
    host: str
    port: int

    @property
    def authority(self) -> str:
        """`host:port`, as a Host header has it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def is_address(self) -> bool:
        """Whether `host` is an address and no name."""
        try:
            ip_address(self.host)
        except ValueError:
            return False
        return True

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}"


def parse_nova_url(text: str) -> NovaUrl:
    """Read `http://HOST[:PORT]` or `https://HOST[:PORT]`; an IPv6 address stands in brackets.

    Raises:
        ValueError: What is wrong, in words for the operator.
    """
    if not all("!" <= letter <= "~" for letter in text):  # urlsplit would leave some out unasked
        raise ValueError("must not hold blanks or letters that are not ASCII")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"is no URL: {error}") from None
    if parts.scheme not in {"http", "https"}:
        raise ValueError("has to begin with http:// or https://")
    if parts.username is not None or parts.password is not None:
        raise ValueError("must not hold a user or password: requests are signed instead")
    if parts.path not in {"", "/"} or parts.query or parts.fragment or "?" in text or "#" in text:
        raise ValueError("must end after the port: guests' paths are sent as they are")
    host = parts.hostname or ""
    if port == 0 or parts.netloc.endswith(":"):
        raise ValueError("has no TCP port after the colon")
    host = _address_v6(host) if parts.netloc.startswith("[") else _name_or_v4(host)
    if host in _ITSELF:
        raise ValueError(f"{host} is where guests ask: requests would come back here")
    if host in {"0.0.0.0", "::"}:  # noqa: S104 - refused, not bound
        raise ValueError(f"{host} is no address that can be connected to")
    scheme: Literal["http", "https"] = "https" if parts.scheme == "https" else "http"
    return NovaUrl(scheme, host, NOVA_METADATA_PORT if port is None else port)


def _address_v6(text: str) -> str:
    try:
        address = IPv6Address(text)
    except ValueError:
        raise ValueError(f"{text!r} is not an IPv6 address") from None
    if address.scope_id is not None:
        raise ValueError("must not name a device: give an address that is the same everywhere")
    return str(address)


def _name_or_v4(text: str) -> str:
    if _ADDRESS_V4.fullmatch(text):
        try:
            return str(IPv4Address(text))  # refuses leading zeros, which some read as octal
        except ValueError:
            raise ValueError(f"{text!r} is not an IPv4 address") from None
    if not _NAME.fullmatch(text) or len(text) > _NAME_LENGTH:
        raise ValueError(f"{text!r} is neither a name nor an address")
    return text
