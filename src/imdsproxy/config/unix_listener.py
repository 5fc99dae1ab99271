"""The listener `unix`: Neutron's agent protocol, for the HAProxies that Neutron's agents start."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from imdsproxy.config.change import Change
from imdsproxy.config.section import AbsolutePath, AccountName, Section, setting

__all__ = ["UnixListenerSettings"]

AccountNameOrId = Annotated[str, Field(pattern=r"^([a-z_][a-z0-9_-]{0,30}\$?|[0-9]{1,10})$")]


class UnixListenerSettings(Section):
    """A unix socket that takes the place of neutron-metadata-agent's."""

    enabled: bool = setting(
        False,
        "Listen on it. Off, because only hosts with Neutron's L3, DHCP or OVN agents have who connects.",
        Change.RELOAD,
    )
    path: AbsolutePath = setting(
        Path("/var/lib/neutron/metadata_proxy"),
        "The socket; the agents' `metadata_proxy_socket` is the same.",
        Change.RELOAD,
    )
    mode: Literal["deduce", "user", "group", "all"] = setting(
        "deduce",
        "Who may connect, as Neutron's `metadata_proxy_socket_mode`: `user` 0644, `group` 0664, `all` 0666. "
        "`deduce` takes the narrowest that lets `proxy_user` and `proxy_group` in.",
        Change.RELOAD,
    )
    user: AccountName | None = setting(
        None,
        "Owner of the socket and of its directory when that is made; null is root.",
        Change.RELOAD,
    )
    group: AccountName | None = setting(
        None,
        "Group of the socket and of its directory when that is made; null is root.",
        Change.RELOAD,
    )
    directory_mode: str = setting(
        "0755",
        "Permissions of the socket's directory, in octal and quoted, when it is made; one that is there is "
        "left as it is.",
        Change.RELOAD,
        pattern=r"^0?[0-7]{3}$",
    )
    proxy_user: AccountNameOrId | None = setting(
        None,
        "Account that the proxies in front run as, for `deduce`: the agents' `metadata_proxy_user`.",
        Change.RELOAD,
    )
    proxy_group: AccountNameOrId | None = setting(
        None, "Their group: the agents' `metadata_proxy_group`.", Change.RELOAD
    )
    maxconn: int = setting(
        1024,
        "Connections open at once, of all networks behind it together.",
        Change.RELOAD,
        ge=1,
        le=100_000,
    )
