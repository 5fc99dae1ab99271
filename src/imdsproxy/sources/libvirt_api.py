"""Libvirt as the source `libvirt` needs it, whoever speaks to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from imdsproxy.sources.libvirt_known import NetworkXml

__all__ = ["ConnectionLost", "DomainChanged", "LibvirtClient", "NetworksChanged", "News"]


@dataclass(frozen=True, slots=True)
class DomainChanged:
    """A domain was defined, started, stopped, undefined, or its metadata or devices changed."""

    uuid: str


@dataclass(frozen=True, slots=True)
class NetworksChanged:
    """A network was defined, started, stopped or undefined."""


@dataclass(frozen=True, slots=True)
class ConnectionLost:
    """Nothing is heard on this connection any more."""

    reason: str


News: TypeAlias = DomainChanged | NetworksChanged | ConnectionLost


class LibvirtClient(Protocol):
    """One connection to a libvirt daemon. Every method may raise `SourceUnavailable`."""

    async def connect(self, tell: Callable[[News], None]) -> None:
        """Connect, and tell in the event loop's thread what happens from now on."""

    async def domains(self) -> Mapping[str, str]:
        """The XML of every domain by its UUID: the live one where it is active."""

    async def domain(self, uuid: str) -> str | None:
        """A domain's XML; `None` when there is no such domain."""

    async def networks(self) -> tuple[NetworkXml, ...]:
        """Every network."""

    async def close(self) -> None:
        """Disconnect; nothing is told any more. Never raises, and can be called twice."""
