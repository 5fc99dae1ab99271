"""The proxy of one network or router, `imdsproxy namespace-proxy`: what all that start on this host have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from imdsproxy.config.change import Change
from imdsproxy.config.section import AbsolutePath, AccountNameOrId, Section, cross, setting
from imdsproxy.core.haproxy.namespace_proxy import (
    DEFAULT_PORT,
    DEFAULT_STATE_PATH,
    MAX_PORT,
    parse_facility,
)
from imdsproxy.errors import RequestRefused


def _facility(text: str) -> str:
    try:
        parse_facility(text)
    except RequestRefused as error:
        raise cross("", error.message, error.hint) from error
    return text


class NamespaceProxySettings(Section):
    """Defaults of `imdsproxy namespace-proxy`, by the names of its options; its command line wins."""

    state_path: AbsolutePath = setting(Path(DEFAULT_STATE_PATH), Change.NOTHING)
    """Directory in which `ns-metadata-proxy` gets HAProxy's configurations."""

    metadata_port: int = setting(DEFAULT_PORT, Change.NOTHING, ge=1, le=MAX_PORT)
    """TCP port to listen on, at every address of the namespace."""

    metadata_proxy_socket: AbsolutePath | None = setting(None, Change.NOTHING)
    """Unix socket that requests go to; null is `metadata_proxy` in the state path."""

    metadata_proxy_user: AccountNameOrId | None = setting(None, Change.NOTHING)
    """Account that HAProxy takes once it listens; null keeps the present one."""

    metadata_proxy_group: AccountNameOrId | None = setting(None, Change.NOTHING)
    """Its group; null keeps the present one."""

    debug: bool = setting(False, Change.NOTHING)
    """Have HAProxy log at the level debug instead of info."""

    use_syslog: bool | None = setting(None, Change.NOTHING)
    """Log requests to /dev/log; null does if it is there."""

    syslog_log_facility: Annotated[str, AfterValidator(_facility)] = setting(
        "LOG_LOCAL0", Change.NOTHING
    )
    """Syslog's facility, by Neutron's or HAProxy's name."""
