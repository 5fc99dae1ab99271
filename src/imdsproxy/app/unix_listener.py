"""The listener `unix` made of the settings: whose the socket and its directory are."""

from __future__ import annotations

from collections.abc import Callable

from imdsproxy.app.account import group_id, user_id
from imdsproxy.config.unix_listener import UnixListenerSettings
from imdsproxy.core.haproxy.model import UnixBind
from imdsproxy.core.socket_mode import deduce_socket_mode
from imdsproxy.host.files import ensure_directory

__all__ = ["apply_unix_directory", "plan_unix_bind"]


def plan_unix_bind(settings: UnixListenerSettings) -> UnixBind | None:
    """The socket that HAProxy is to bind; `None` when it is off.

    Raises:
        HostRefused: An account of the settings does not exist.
    """
    if not settings.enabled:
        return None
    owner, group = _owner(settings)
    mode = deduce_socket_mode(
        settings.mode,
        owner=owner,
        group=group,
        proxy_user=_id(settings.proxy_user, user_id),
        proxy_group=_id(settings.proxy_group, group_id),
    )
    return UnixBind(str(settings.path), f"{mode:04o}", owner, group, settings.maxconn)


def apply_unix_directory(settings: UnixListenerSettings) -> None:
    """Make the socket's directory where it is missing; one that is there is Neutron's and left alone.

    Raises:
        HostRefused: The file system refuses, or an account does not exist.
        PrivilegeMissing: We may not write there.
    """
    if settings.enabled and not settings.path.parent.is_dir():
        mode = int(settings.directory_mode, 8)
        ensure_directory(settings.path.parent, mode=mode, owner=_owner(settings))


def _owner(settings: UnixListenerSettings) -> tuple[int, int]:
    user, group = settings.user, settings.group
    return (0 if user is None else user_id(user), 0 if group is None else group_id(group))


def _id(account: str | None, look_up: Callable[[str], int]) -> int | None:
    if account is None:
        return None
    return int(account) if account.isdecimal() else look_up(account)
