"""A path that a living process has: taken over where the settings say so, and not for ever fought for."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Final

import pytest
from structlog.testing import capture_logs

from imdsproxy.core.haproxy.config import render_config
from imdsproxy.core.haproxy.model import DataplaneSpec, UnixBind
from imdsproxy.core.haproxy.runtime import Processes
from imdsproxy.core.hoststate import SeenSocket, SocketOwner, SocketState
from imdsproxy.dataplane.layout import Layout
from imdsproxy.errors import ReloadFailed, RuntimeUnavailable
from imdsproxy.unix_listener.listener import UnixListener
from imdsproxy.unix_listener.plan import Takeovers
from imdsproxy.unix_listener.settings import UnixListenerSettings

_AGENT: Final = SeenSocket(SocketState.FOREIGN, (SocketOwner(77, "neutron-ovn-met"),))
_OURS: Final = SeenSocket(SocketState.OURS)


def _after(*times: float) -> Takeovers:
    takeovers = Takeovers()
    for one in times:
        takeovers.note(one)
    return takeovers


# How often


@pytest.mark.parametrize(
    ("times", "pause"),
    [
        ((), 0),
        ((0,), 0),
        ((0, 1), 0),
        ((0, 1, 2), 15),
        ((0, 30, 59), 15),
        ((0, 30, 60), 0),
        ((0, 60, 120, 180, 240), 0),
        ((0, 1, 2, 17), 30),
        ((0, 1, 2, 17, 47), 60),
        ((0, 1, 2, 17, 106), 60),
        # Beside the pause, a minute without a takeover: the other process has stopped.
        ((0, 1, 2, 17, 107), 0),
        ((0, 1, 2, 77), 0),
    ],
    ids=str,
)
def test_what_is_taken_back_each_time_is_left_alone_ever_longer(
    times: tuple[float, ...], pause: float
) -> None:
    assert _after(*times).pause_s == pause


def test_a_fight_comes_down_to_one_taking_in_ten_minutes_and_no_fewer() -> None:
    takeovers, now, taken = Takeovers(), 0.0, []
    for _ in range(20):
        now += takeovers.pause_left_s(now) or 1.0
        takeovers.note(now)
        taken.append(now)
    pauses = [after - before for before, after in pairwise(taken)]
    assert pauses[:9] == [1, 1, 15, 30, 60, 120, 240, 480, 600]
    assert set(pauses[8:]) == {600}


def test_a_pause_runs_from_the_last_taking() -> None:
    assert Takeovers().pause_left_s(5) == 0
    assert [_after(0, 1, 2).pause_left_s(now) for now in (2, 10, 17, 20)] == [15, 7, 0, 0]


# What the listener makes of it


class _Haproxy:
    """One that runs, with what it has bound."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.records = self
        self.master = self
        self.processes = Processes(10, 11)
        self.bound: UnixBind | None = None
        self.answers = True

    async def read_processes(self) -> Processes:
        if not self.answers:
            raise RuntimeUnavailable("no answer")
        return self.processes

    def in_force(self) -> str:
        layout = Layout(Path("/run/imdsproxy"), Path("/var/lib/imdsproxy"))
        return render_config(DataplaneSpec((), layout.haproxy_paths(), unix=self.bound))


@dataclass
class _Clock:
    seconds: float = 0.0

    def monotonic(self) -> float:
        return self.seconds


@dataclass
class _Rig:
    """The listener with a HAProxy that binds what it is configured to, and a path that any process may take."""

    directory: Path
    fields: Mapping[str, object] = field(default_factory=dict)
    seen: SeenSocket = _AGENT
    clock: _Clock = field(default_factory=_Clock)

    def __post_init__(self) -> None:
        self.path = self.directory / "agents" / "metadata_proxy"
        self.haproxy = _Haproxy()
        self.configure(**{"take_over": True, **self.fields})
        self.unix = UnixListener(
            lambda: self.settings,
            self.haproxy,  # type: ignore[arg-type]  # the part that is used
            self.look,
            self.clock,  # type: ignore[arg-type]  # as above
        )

    def configure(self, **fields: object) -> None:
        self.settings = UnixListenerSettings.model_validate(
            {"enabled": True, "path": str(self.path), **fields}
        )

    def look(self, path: Path, our_pids: Collection[int]) -> SeenSocket:
        del path, our_pids
        return self.seen

    @property
    def reason(self) -> str:
        return "" if self.unix.problem is None else self.unix.problem.reason

    async def round(self) -> bool:
        """What the listener loop does; whether HAProxy has the path then."""
        await self.unix.choose()
        bind = self.unix.bind
        if bind is not None and (self.unix.rebind or self.haproxy.bound != bind):
            self.seen = _OURS
            self.path.unlink(missing_ok=True)
            with socket.socket(socket.AF_UNIX) as sock:
                sock.bind(str(self.path))
        self.haproxy.bound = bind
        await self.unix.settle(None)
        return self.seen is _OURS

    async def lose(self, *, after_s: float = 1.0) -> bool:
        """Another process takes the path; whether HAProxy has it again after the next round."""
        self.clock.seconds += after_s
        self.seen = SeenSocket(SocketState.FOREIGN, _AGENT.owners, orphaned=True)
        return await self.round()


@pytest.fixture
def rig(tmp_path: Path) -> _Rig:
    return _Rig(tmp_path)


async def test_a_living_process_keeps_its_path_unless_it_is_to_be_taken_over(
    tmp_path: Path,
) -> None:
    rig = _Rig(tmp_path, {"take_over": False})
    assert not await rig.round()
    assert "set unix_listener.take_over" in str(rig.unix.problem)
    rig.configure(take_over=True)
    assert await rig.round()
    assert (rig.reason, rig.unix.taken_over) == ("", 1)


async def test_whom_it_was_taken_from_is_told_once(rig: _Rig) -> None:
    with capture_logs() as logs:
        assert await rig.round()
        for _ in range(3):
            assert await rig.round()
    (line,) = logs
    assert (line["event"], line["log_level"]) == ("unix listener taken over", "info")
    assert line["taken_from"] == rig.unix.taken_from == "neutron-ovn-met (pid 77)"
    assert (rig.unix.taken_over, rig.unix.problem) == (1, None)


async def test_who_cannot_be_seen_is_replaced_as_well(rig: _Rig) -> None:
    rig.seen = SeenSocket(SocketState.FOREIGN)
    assert await rig.round()
    assert rig.unix.taken_from == "another process"


@pytest.mark.parametrize("orphaned", [False, True])
async def test_a_haproxy_that_has_lost_the_path_lets_go_of_its_socket_first(
    rig: _Rig, *, orphaned: bool
) -> None:
    await rig.round()
    # Where the kernel lists no unix sockets ours can't be known to be one without a path.
    rig.seen = SeenSocket(SocketState.FOREIGN, orphaned=orphaned)
    await rig.unix.choose()
    assert (rig.unix.bind is not None, rig.unix.rebind) == (True, True)


async def test_one_that_has_nothing_to_let_go_of_binds_at_once(rig: _Rig) -> None:
    await rig.unix.choose()
    assert (rig.unix.bind is not None, rig.unix.rebind) == (True, False)


async def test_what_is_no_socket_is_never_taken(rig: _Rig) -> None:
    rig.seen = SeenSocket(SocketState.OCCUPIED)
    assert not await rig.round()
    assert "is no socket" in rig.reason


async def test_an_agent_that_is_started_again_now_and_then_is_replaced_at_once(rig: _Rig) -> None:
    await rig.round()
    for _ in range(20):
        assert await rig.lose(after_s=61)
    assert rig.unix.taken_over == 21


async def test_who_takes_it_back_each_time_has_it_for_a_while_and_status_says_so(rig: _Rig) -> None:
    await rig.round()
    assert await rig.lose()
    assert await rig.lose()
    assert not await rig.lose()
    (before, count) = (rig.reason, rig.unix.taken_over)
    assert before.startswith(f"neutron-ovn-met (pid 77) listens on {rig.path}, and took it back")
    assert "15 s" in before
    assert rig.unix.bind is None
    # The same text: what is logged already is not logged again.
    rig.clock.seconds += 10
    assert not await rig.round()
    assert (rig.reason, rig.unix.taken_over) == (before, count)
    rig.clock.seconds += 5
    assert await rig.round()
    assert (rig.reason, rig.unix.taken_over) == ("", count + 1)
    assert not await rig.lose()
    assert "30 s" in rig.reason


async def test_while_it_is_left_alone_a_path_that_comes_free_is_bound(rig: _Rig) -> None:
    for _ in range(4):
        await rig.lose()
    assert rig.unix.bind is None
    rig.seen = SeenSocket(SocketState.STALE)
    await rig.unix.choose()
    assert (rig.unix.bind is not None, rig.reason) == (True, "")


async def test_what_haproxy_could_not_take_does_not_count(rig: _Rig) -> None:
    await rig.unix.choose()
    assert rig.unix.blame(ReloadFailed(f"[ALERT] cannot bind [{rig.path}]"))
    await rig.unix.settle(None)
    assert (rig.unix.taken_over, rig.unix.taken_from) == (0, "")


async def test_what_did_not_come_to_pass_does_not_count_later(rig: _Rig) -> None:
    await rig.unix.choose()
    # Something else kept it back; then HAProxy is started anew with what it had.
    rig.haproxy.bound = rig.unix.bind
    rig.haproxy.answers = False
    await rig.unix.choose()
    assert rig.unix.bind is not None
    await rig.unix.settle(None)
    assert rig.unix.taken_over == 0


async def test_who_has_it_still_is_not_pushed_aside_once_the_setting_is_off(rig: _Rig) -> None:
    await rig.round()
    rig.configure(take_over=False)
    assert await rig.round(), "ours stays ours"
    assert not await rig.lose()
    assert (rig.unix.bind, rig.unix.rebind, rig.unix.taken_over) == (None, False, 1)


async def test_the_file_of_who_bound_while_we_looked_is_not_removed(rig: _Rig) -> None:
    await rig.round()

    def look(path: Path, our_pids: Collection[int]) -> SeenSocket:
        del our_pids
        path.with_name("new").write_text("the agent's")
        path.with_name("new").rename(path)
        return _OURS

    rig.unix.look = look
    rig.configure(enabled=False)
    await rig.unix.choose()
    await rig.unix.settle(str(rig.path))
    assert [one.read_text() for one in rig.path.parent.iterdir()] == ["the agent's"]
