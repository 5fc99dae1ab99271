"""The listener `unix`: Neutron's agent protocol, for the HAProxies that Neutron's agents start."""

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
"""HAProxy binds beside the path and renames: of the kernel's 107 bytes ten are for that."""

_PLAIN: Final = re.compile(r"/[A-Za-z0-9._/@+-]+")


def _bindable(path: Path) -> Path:
    if not _PLAIN.fullmatch(str(path)):
        raise ValueError(f"{path} has characters other than A-Za-z0-9._/@+-")
    if len(str(path)) > _LONGEST:
        raise ValueError(f"{path} has {len(str(path))} characters, HAProxy takes {_LONGEST}")
    return path


class UnixListenerSettings(Section):
    """A unix socket that takes the place of neutron-metadata-agent's."""

    enabled: bool = setting(False, Change.RELOAD)
    """Listen on it. Off, because only hosts with Neutron's L3, DHCP or OVN agents have clients of this socket."""

    path: Annotated[AbsolutePath, AfterValidator(_bindable)] = setting(
        Path("/var/lib/neutron/metadata_proxy"), Change.RELOAD
    )
    """The socket; the agents' `metadata_proxy_socket` is the same."""

    take_over: bool = setting(False, Change.RELOAD)
    """Take the path also from a process that lives, and again when it takes it back, with pauses when it does so time
    after time. For OVN, whose agent listens there and has to run on; off, starting the agent again is the way back to
    it.
    """

    mode: Literal["deduce", "user", "group", "all"] = setting("deduce", Change.RELOAD)
    """Who may connect, as Neutron's `metadata_proxy_socket_mode`: `user` 0644, `group` 0664, `all` 0666. `deduce`
    takes the narrowest that lets `proxy_user` and `proxy_group` in.
    """

    user: AccountName | None = setting(None, Change.RELOAD)
    """Owner of the socket, and of its directory when that is made. Null is the directory's owner, who is the agents'
    account already; root when the directory is made.
    """

    group: AccountName | None = setting(None, Change.RELOAD)
    """Group of the socket, and of its directory when that is made; null is the directory's."""

    directory_mode: Mode = setting("0755", Change.RELOAD)
    """Permissions of the socket's directory, in octal and quoted, when it is made; one that is there is left as it
    is.
    """

    proxy_user: AccountNameOrId | None = setting(None, Change.RELOAD)
    """Account that the proxies in front run as, for `deduce`: the agents' `metadata_proxy_user`."""

    proxy_group: AccountNameOrId | None = setting(None, Change.RELOAD)
    """Their group: the agents' `metadata_proxy_group`."""

    maxconn: int = setting(1024, Change.RELOAD, ge=1, le=100_000)
    """Connections open at once, of all networks behind it together."""
