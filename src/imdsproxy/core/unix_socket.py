"""The socket file of the listener `unix`: what is at its path, and what that means for the listener.

HAProxy moves its socket to the path by rename: it would take the place of whatever is there, a living agent's
socket or a file, without a word. And it hands a socket over to its next worker although the file is gone. So
somebody else has to look. Where a living process is to be replaced (`unix_listener.take_over`) the rename is what is
wanted: whoever connects finds the one or the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import assert_never

from imdsproxy.core.hoststate import SocketOwner
from imdsproxy.errors import Problem


class SocketState(StrEnum):
    """What is at the path."""

    MISSING = "missing"
    STALE = "stale"
    """A socket that nobody listens on any more."""

    OURS = "ours"
    FOREIGN = "foreign"
    """Somebody else's, who lives."""

    OCCUPIED = "occupied"
    """Something that is no socket."""


@dataclass(frozen=True, slots=True)
class SeenSocket:
    """What was seen at one moment.

    Attributes:
        owners: Who listens, for `FOREIGN`, as far as that can be seen.
        orphaned: HAProxy listens on a socket that was at the path, and is not any more: nobody can connect to it,
            and the next worker would be handed the same one.
    """

    state: SocketState
    owners: tuple[SocketOwner, ...] = ()
    orphaned: bool = False


def name_owners(seen: SeenSocket) -> str:
    """Who listens, in words."""
    who = " and ".join(f"{one.command} (pid {one.pid})" for one in seen.owners)
    return who or "another process"


def judge_socket(path: str, seen: SeenSocket) -> Problem | None:
    """Why HAProxy may not bind at the path; `None` when it may."""
    match seen.state:
        case SocketState.MISSING | SocketState.STALE | SocketState.OURS:
            return None
        case SocketState.FOREIGN:
            return Problem(
                "unix_listener.path",
                f"{name_owners(seen)} listens on {path}: the unix listener is left out",
                "end it, and the socket is taken within a second; where it has to run on, as OVN's agent has, set "
                "unix_listener.take_over",
            )
        case SocketState.OCCUPIED:
            return Problem(
                "unix_listener.path",
                f"{path} is there and is no socket: the unix listener is left out",
                "move it away, or choose another path",
            )
        case _ as never:
            assert_never(never)


def explain_pause(path: str, seen: SeenSocket, pause_s: float) -> Problem:
    """Why the path is left to a living process for a while, although it is to be taken.

    Args:
        path: Of the socket.
        seen: Who has it.
        pause_s: Seconds from the last taking to the next.
    """
    return Problem(
        "unix_listener.take_over",
        f"{name_owners(seen)} listens on {path}, and took it back each time: it is left alone until {pause_s:g} s "
        "after the last time",
        "two want one path: end whoever starts it again and again, or set unix_listener.take_over: false",
    )
