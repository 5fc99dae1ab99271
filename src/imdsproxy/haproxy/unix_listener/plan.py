"""Rules for the path of the listener `unix`: permission to bind, socket mode, and pauses between takeovers. Pure.

HAProxy renames its socket to the path, which replaces any file there without a warning, even a running agent's socket.
HAProxy also hands a socket over to its next worker if the file is gone. So this module checks the path first. If a
running process should be replaced (`unix_listener.take_over`), the rename is useful: at any time clients reach one of
the two processes.

The first takeovers happen at once. A process that takes the path back each time keeps it for longer and longer pauses.
An agent restarted for an upgrade takes the path once or twice. An agent that does so repeatedly is restarted by a
supervisor, or fails to start: each takeover reloads HAProxy, and a fight helps no guest.
"""

from dataclasses import dataclass
from typing import Final

from imdsproxy.errors import Problem
from imdsproxy.host.state import SeenSocket, SocketState

_WINDOW_S: Final = 60.0
_AT_ONCE: Final = 3
"""Number of takeovers within the window without a pause; an upgrade of an agent needs two."""

_FIRST_PAUSE_S: Final = 15.0
_LAST_PAUSE_S: Final = 600.0


def name_owners(seen: SeenSocket) -> str:
    who = " and ".join(f"{one.command} (pid {one.pid})" for one in seen.owners)
    return who or "another process"


def judge_socket(path: str, seen: SeenSocket, *, take_over: bool, pause_s: float) -> Problem | None:
    """Return why HAProxy may not bind the path, or only after a pause between takeovers; `None` if it may."""
    if seen.state is SocketState.OCCUPIED:
        return Problem(
            "unix_listener.path",
            f"{path} exists and is not a socket: the unix listener is not served",
            "move the file, or choose another path",
        )
    if seen.state is not SocketState.FOREIGN or (take_over and not pause_s):
        return None
    if take_over:
        return Problem(
            "unix_listener.take_over",
            f"{name_owners(seen)} listens on {path}, and took the path back each time. imdsproxy waits until "
            f"{pause_s:g} s after the last time",
            "two programs want one path: stop what restarts the other, or set unix_listener.take_over: false",
        )
    return Problem(
        "unix_listener.path",
        f"{name_owners(seen)} listens on {path}: the unix listener is not served",
        "end that process, and HAProxy takes the socket within a second; if it must go on, as OVN's agent must, set "
        "unix_listener.take_over",
    )


@dataclass(slots=True)
class Takeovers:
    """Recent takeovers and the pause before the next.

    Attributes:
        times: Times of the takeovers within the window, in seconds of one clock, the oldest first.
        pause_s: Seconds after the last takeover during which the other process keeps the path.
    """

    times: tuple[float, ...] = ()
    pause_s: float = 0.0

    def note(self, now: float) -> None:
        """Record a takeover; `now` is not before the last takeover."""
        # Without a takeover for a window beyond the pause, the other process has stopped taking the path.
        calm = not self.times or now - self.times[-1] >= self.pause_s + _WINDOW_S
        self.times = (*(one for one in self.times if now - one < _WINDOW_S), now)
        if self.pause_s and not calm:
            self.pause_s = min(self.pause_s * 2, _LAST_PAUSE_S)
        else:
            self.pause_s = _FIRST_PAUSE_S if len(self.times) >= _AT_ONCE else 0.0

    def pause_left_s(self, now: float) -> float:
        """Return the seconds for which the other process still keeps the path; 0 if a takeover is allowed."""
        return max(0.0, self.times[-1] + self.pause_s - now) if self.times else 0.0


_MODES: Final = {"user": 0o644, "group": 0o664, "all": 0o666}
"""Permission bits of the socket; clients need write permission to connect."""


def deduce_socket_mode(
    word: str, *, owner: int, group: int, proxy_user: int | None, proxy_group: int | None
) -> int:
    """Return the permission bits for `word`, as Neutron's agent deduces them (neutron/agent/metadata/proxy_base.py).

    `deduce` gives the narrowest mode with which the proxies can connect.

    Args:
        word: `metadata_proxy_socket_mode`: `deduce`, `user`, `group` or `all`.
        proxy_user: Uid of the proxies; `None` for the socket's owner or root.
        proxy_group: Gid of the proxies; `None` for the socket's group.
    """
    if word == "deduce":
        in_group = "group" if proxy_group in {None, group} else "all"
        word = "user" if proxy_user in {None, 0, owner} else in_group
    return _MODES[word]
