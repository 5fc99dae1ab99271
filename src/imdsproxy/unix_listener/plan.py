"""What the listener `unix` does about its socket's path: whether it may bind, with which mode, and when it takes over.

HAProxy moves its socket to the path by rename: it would replace whatever is there, a running agent's socket or a
file, without a warning. And it hands a socket over to its next worker although the file is gone. So the path is
checked here. Where a running process is to be replaced (`unix_listener.take_over`) the rename is what is wanted:
every client reaches the one or the other.

A path is taken at once, and ever more seldom from a process that takes it back each time. An agent that is restarted,
for an upgrade say, takes the path once or twice. One that does it again and again is restarted by a supervisor, or
never comes up: each taking is a reload of HAProxy, and a fight helps no guest.
"""

from dataclasses import dataclass
from typing import Final

from imdsproxy.core.hoststate import SeenSocket, SocketState
from imdsproxy.errors import Problem

_WINDOW_S: Final = 60.0
_AT_ONCE: Final = 3
"""So many within the window need no pause; two are what an upgrade of an agent takes."""

_FIRST_PAUSE_S: Final = 15.0
_LAST_PAUSE_S: Final = 600.0


def name_owners(seen: SeenSocket) -> str:
    """The listening processes, for messages."""
    who = " and ".join(f"{one.command} (pid {one.pid})" for one in seen.owners)
    return who or "another process"


def judge_socket(path: str, seen: SeenSocket, *, take_over: bool, pause_s: float) -> Problem | None:
    """Why HAProxy may not bind at the path; `None` when it may.

    Args:
        path: Of the socket.
        seen: What is there.
        take_over: It may be taken from a running process.
        pause_s: Seconds from the last takeover to the next, while that one is still to come.
    """
    if seen.state is SocketState.OCCUPIED:
        return Problem(
            "unix_listener.path",
            f"{path} is there and is no socket: the unix listener is not served",
            "move it away, or choose another path",
        )
    if seen.state is not SocketState.FOREIGN or (take_over and not pause_s):
        return None
    if take_over:
        return Problem(
            "unix_listener.take_over",
            f"{name_owners(seen)} listens on {path}, and took it back each time: it is left alone until {pause_s:g} s "
            "after the last time",
            "two want one path: end what restarts it, or set unix_listener.take_over: false",
        )
    return Problem(
        "unix_listener.path",
        f"{name_owners(seen)} listens on {path}: the unix listener is not served",
        "end it, and the socket is taken within a second; where it has to run on, as OVN's agent has, set "
        "unix_listener.take_over",
    )


@dataclass(slots=True)
class Takeovers:
    """The takeovers that still count.

    Attributes:
        times: Seconds of one clock, the oldest first.
        pause_s: How long after the last of them the path is left to the other process.
    """

    times: tuple[float, ...] = ()
    pause_s: float = 0.0

    def note(self, now: float) -> None:
        """There is one more; `now` is not before the last of them."""
        # No takeover for a window beyond the pause: the other process has stopped.
        calm = not self.times or now - self.times[-1] >= self.pause_s + _WINDOW_S
        self.times = (*(one for one in self.times if now - one < _WINDOW_S), now)
        if self.pause_s and not calm:
            self.pause_s = min(self.pause_s * 2, _LAST_PAUSE_S)
        else:
            self.pause_s = _FIRST_PAUSE_S if len(self.times) >= _AT_ONCE else 0.0

    def pause_left_s(self, now: float) -> float:
        """Seconds for which the path is still left to the other process; 0 when it may be taken."""
        return max(0.0, self.times[-1] + self.pause_s - now) if self.times else 0.0


_MODES: Final = {"user": 0o644, "group": 0o664, "all": 0o666}
"""Permission bits of the socket; to connect takes the right to write."""


def deduce_socket_mode(
    word: str, *, owner: int, group: int, proxy_user: int | None, proxy_group: int | None
) -> int:
    """The permission bits for `word`, as Neutron's agent deduces them (neutron/agent/metadata/proxy_base.py).

    `deduce` gives the narrowest with which the proxies can connect.

    Args:
        word: `metadata_proxy_socket_mode`: `deduce`, `user`, `group` or `all`.
        owner: The socket's uid.
        group: The socket's gid.
        proxy_user: The uid that the proxies run as; `None` where that is the owner's or root's.
        proxy_group: Their gid; `None` where that is the socket's.
    """
    if word == "deduce":
        in_group = "group" if proxy_group in {None, group} else "all"
        word = "user" if proxy_user in {None, 0, owner} else in_group
    return _MODES[word]
