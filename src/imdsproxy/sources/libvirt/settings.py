"""The source `libvirt`: which daemon is asked, and which of its domains and networks are reported."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Strict

from imdsproxy.config.change import Change
from imdsproxy.config.section import Section, form, setting

ConnectionUri = Annotated[
    str, form(r"^[a-z][a-z0-9+.-]*://[\x21-\x7e]*$", "a URI, as qemu:///system")
]
NetworkName = Annotated[str, form(r"^[^\x00-\x1f/]{1,255}$", "a name without a slash")]


class LibvirtSourceSettings(Section):
    """Domains and networks of a libvirt daemon."""

    enabled: bool = setting(False, Change.RESTART)
    """Ask libvirt. Off, because not every host with libvirt should serve metadata to its guests."""

    uri: ConnectionUri = setting("qemu:///system", Change.RESTART)
    """The daemon, as `virsh -c` takes it. It is opened read-only."""

    networks: Annotated[tuple[NetworkName, ...], Strict(strict=False)] | None = setting(
        None, Change.RESTART
    )
    """Only these: networks of libvirt's by name, bridges of the host's by device; null for all."""

    domains: Literal["all", "marked"] = setting("all", Change.RESTART)
    """`marked`: only domains with an `<imds:instance>` in their metadata. Others get their name as host name, their
    UUID as instance id, and nothing else.
    """

    reread_s: float = setting(30.0, Change.RESTART, ge=1, le=3600)
    """Seconds after which networks are read again without an event: libvirt has none for a static host that is added
    to a running network, until something happens to a domain.
    """
