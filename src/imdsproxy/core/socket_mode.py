"""Who may connect to the listener `unix`, as Neutron's agent works it out (neutron/agent/metadata/proxy_base.py)."""

from __future__ import annotations

from enum import IntEnum
from typing import Literal, TypeAlias

__all__ = ["SocketMode", "SocketModeWord", "deduce_socket_mode"]

SocketModeWord: TypeAlias = Literal["deduce", "user", "group", "all"]


class SocketMode(IntEnum):
    """Permission bits of the socket; to connect takes the right to write."""

    USER = 0o644
    GROUP = 0o664
    ALL = 0o666


def deduce_socket_mode(
    word: SocketModeWord,
    *,
    owner: int,
    group: int,
    proxy_user: int | None,
    proxy_group: int | None,
) -> SocketMode:
    """The permission bits for `word`; `deduce` gives the narrowest with which the proxies can connect.

    Args:
        word: `metadata_proxy_socket_mode`.
        owner: The socket's uid.
        group: The socket's gid.
        proxy_user: The uid that the proxies run as; `None` where that is the owner's or root's.
        proxy_group: Their gid; `None` where that is the socket's.
    """
    if word != "deduce":
        return SocketMode[word.upper()]
    if proxy_user in {None, 0, owner}:
        return SocketMode.USER
    if proxy_group in {None, group}:
        return SocketMode.GROUP
    return SocketMode.ALL
