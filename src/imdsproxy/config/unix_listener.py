"""Settings of the listener `unix`: Neutron's agent protocol, for the HAProxies that Neutron's agents start."""

import re
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import AfterValidator

from imdsproxy.config.section import (
    AbsolutePath,
    AccountName,
    AccountNameOrId,
    Change,
    Mode,
    Section,
    setting,
)

_LONGEST: Final = 97
"""Maximum length of the path: HAProxy binds a temporary name, whose suffix takes ten of the kernel's 107 bytes."""

_PLAIN: Final = re.compile(r"/[A-Za-z0-9._/@+-]+")


def _bindable(path: Path) -> Path:
    if not _PLAIN.fullmatch(str(path)):
        raise ValueError(f"{path} has characters other than A-Za-z0-9._/@+-")
    if len(str(path)) > _LONGEST:
        raise ValueError(f"{path} has {len(str(path))} characters, HAProxy takes {_LONGEST}")
    return path


class UnixListenerSettings(Section):
    """A unix socket that replaces neutron-metadata-agent's."""

    enabled: bool = setting(False, Change.RELOAD)
    """Listen on the socket. Off, because only hosts with Neutron's L3, DHCP or OVN agents have clients for it."""

    path: Annotated[AbsolutePath, AfterValidator(_bindable)] = setting(
        Path("/var/lib/neutron/metadata_proxy"), Change.RELOAD
    )
    """Path of the socket, the same as the agents' `metadata_proxy_socket`."""

    take_over: bool = setting(False, Change.RELOAD)
    """Take the path from a running process too. If that process takes the path back repeatedly, takeovers pause for
    longer and longer. For OVN, whose agent listens there and must keep running. Off, so that starting the agent again
    returns the path to the agent.
    """

    mode: Literal["deduce", "user", "group", "all"] = setting("deduce", Change.RELOAD)
    """Mode of the socket, as Neutron's `metadata_proxy_socket_mode`: `user` 0644, `group` 0664, `all` 0666. `deduce`
    takes the narrowest mode with which `proxy_user` and `proxy_group` can connect.
    """

    user: AccountName | None = setting(None, Change.RELOAD)
    """Owner of the socket, and of its directory if imdsproxy creates the directory. Null is the owner of the existing
    directory, which is the agents' account; root for a new directory.
    """

    group: AccountName | None = setting(None, Change.RELOAD)
    """Group of the socket, and of its directory if imdsproxy creates the directory; null is the directory's group."""

    directory_mode: Mode = setting("0755", Change.RELOAD)
    """Permissions for a new directory of the socket, in octal and quoted. An existing directory is not changed."""

    proxy_user: AccountNameOrId | None = setting(None, Change.RELOAD)
    """Account of the proxies that connect, for `deduce`: the agents' `metadata_proxy_user`."""

    proxy_group: AccountNameOrId | None = setting(None, Change.RELOAD)
    """Group of the proxies, for `deduce`: the agents' `metadata_proxy_group`."""

    maxconn: int = setting(1024, Change.RELOAD, ge=1, le=100_000)
    """Maximum number of open connections, of all networks behind the socket together."""
