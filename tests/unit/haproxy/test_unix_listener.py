"""What HAProxy is to bind for Neutron's proxies, decided by what is at the path and by its answers before."""

import asyncio
import os
import socket
from collections.abc import Collection
from itertools import pairwise
from pathlib import Path
from typing import Final

import pytest
from structlog.testing import capture_logs

from imdsproxy.config.schema import UnixListenerSettings
from imdsproxy.errors import DataplaneError, ReloadFailed, RuntimeUnavailable
from imdsproxy.haproxy.layout import Layout
from imdsproxy.haproxy.rules.config import render_config
from imdsproxy.haproxy.rules.model import DataplaneSpec, UnixBind
from imdsproxy.haproxy.rules.runtime import Processes
from imdsproxy.haproxy.unix_listener.listener import UnixListener, sweep_unix_socket
from imdsproxy.haproxy.unix_listener.plan import Takeovers, deduce_socket_mode
from imdsproxy.host.state import SeenSocket, SocketOwner, SocketState
from support.hand_clock import HandClock

_AGENT: Final = SeenSocket(SocketState.FOREIGN, (SocketOwner(77, "neutron-ovn-met"),))
_OURS: Final = SeenSocket(SocketState.OURS)
_OWNER, _GROUP, _OTHER = 1, 2, 3


def _config(bind: UnixBind | None) -> str:
    layout = Layout(Path("/run/imdsproxy"), Path("/var/lib/imdsproxy"))
    return render_config(DataplaneSpec((), layout.haproxy_paths(), unix=bind))


class _Haproxy:
    """A master with one worker, its processes, and what it has bound."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.records = self
        self.master = self
        self.processes: Processes | None = Processes(10, 11)
        self.now: Processes | None = self.processes
        self.bound: UnixBind | None = None

    async def read_processes(self) -> Processes:
        assert self.lock.locked(), "it may just be starting"
        if self.now is None:
            raise RuntimeUnavailable("no answer")
        return self.now

    def in_force(self) -> str:
        return _config(self.bound)


class _Rig:
    """The listener with a HAProxy that binds what it is configured to, and a path that any process may take."""

    def __init__(self, directory: Path, **fields: object) -> None:
        self.path = directory / "agents" / "metadata_proxy"
        self.configure(**fields)
        self.haproxy = _Haproxy()
        self.clock = HandClock()
        self.seen = SeenSocket(SocketState.MISSING)
        self.seen_by: dict[int, SeenSocket] = {}
        self.unix = UnixListener(
            lambda: self.settings,
            self.haproxy,  # type: ignore[arg-type]  # the part that is used
            self.look,
            self.clock,
        )

    def configure(self, **fields: object) -> None:
        self.settings = UnixListenerSettings.model_validate(
            {"enabled": True, "path": str(self.path), **fields}
        )

    def look(self, path: Path, our_pids: Collection[int]) -> SeenSocket:
        del path
        return next((self.seen_by[pid] for pid in our_pids if pid in self.seen_by), self.seen)

    async def choose(self) -> tuple[bool, bool]:
        """Whether it is to be bound now, and whether HAProxy must let go of its socket first."""
        await self.unix.choose()
        return self.unix.bind is not None, self.unix.rebind

    @property
    def reason(self) -> str:
        return "" if self.unix.problem is None else self.unix.problem.reason

    def refusal(self) -> DataplaneError:
        return ReloadFailed(f"[ALERT] for frontend agents: cannot bind [{self.path}].")

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

    async def lose(self) -> bool:
        """Another process takes the path; whether HAProxy has it again after the next round."""
        self.clock.time += 1
        self.seen = SeenSocket(SocketState.FOREIGN, _AGENT.owners, orphaned=True)
        return await self.round()


@pytest.fixture
def rig(tmp_path: Path) -> _Rig:
    return _Rig(tmp_path)


@pytest.fixture
def taking(tmp_path: Path) -> _Rig:
    """One that takes the path over, which an agent has."""
    rig = _Rig(tmp_path, take_over=True)
    rig.seen = _AGENT
    return rig


@pytest.mark.parametrize(
    ("word", "user", "group", "mode"),
    [
        ("user", _OTHER, _OTHER, 0o644),
        ("group", None, None, 0o664),
        ("all", None, None, 0o666),
        *(("deduce", one, _OTHER, 0o644) for one in (None, 0, _OWNER)),
        ("deduce", _OTHER, None, 0o664),
        ("deduce", _OTHER, _GROUP, 0o664),
        ("deduce", _OTHER, _OTHER, 0o666),
        # Root's group is a group as another: only its user may do everything.
        ("deduce", _OTHER, 0, 0o666),
    ],
)
def test_the_mode_is_the_settings_or_the_narrowest_with_which_the_proxies_can_connect(
    word: str, user: int | None, group: int | None, mode: int
) -> None:
    found = deduce_socket_mode(word, owner=_OWNER, group=_GROUP, proxy_user=user, proxy_group=group)
    assert found == mode


async def test_off_is_nothing_to_bind_and_no_problem(rig: _Rig) -> None:
    rig.configure(enabled=False)
    assert await rig.choose() == (False, False)
    assert (rig.reason, rig.unix.changed(), rig.path.parent.exists()) == ("", False, False)


_ORPHANED: Final = SeenSocket(SocketState.MISSING, orphaned=True)
_LOST: Final = SeenSocket(SocketState.FOREIGN, _AGENT.owners, orphaned=True)


@pytest.mark.parametrize(
    ("seen", "take_over", "was_bound", "choice", "reason"),
    [
        *((SeenSocket(SocketState(one)), False, False, (True, False), "") for one in ("missing", "stale", "ours")),
        # A socket without a path is let go of first.
        (_ORPHANED, False, False, (True, True), ""),
        (_AGENT, False, False, (False, False), "neutron-ovn-met (pid 77) listens on "),
        (_LOST, False, True, (False, False), "set unix_listener.take_over"),
        (_AGENT, True, False, (True, False), ""),
        # Where the kernel lists no unix sockets ours can't be known to be one without a path.
        (_AGENT, True, True, (True, True), ""),
        (_LOST, True, True, (True, True), ""),
        (SeenSocket(SocketState.OCCUPIED), True, False, (False, False), "is not a socket"),
    ],
    ids=str,
)  # fmt: skip
async def test_what_is_at_the_path_decides_whether_it_is_bound_and_let_go_of_first(
    rig: _Rig,
    seen: SeenSocket,
    choice: tuple[bool, bool],
    reason: str,
    *,
    take_over: bool,
    was_bound: bool,
) -> None:
    bind = UnixBind(str(rig.path), "0644", 0, 0)
    rig.configure(take_over=take_over)
    rig.haproxy.bound = bind if was_bound else None
    rig.seen = seen
    assert await rig.choose() == choice
    assert rig.unix.bind == (bind if choice[0] else None)
    assert bool(rig.reason) is not choice[0]
    assert reason in str(rig.unix.problem)


@pytest.mark.parametrize(
    ("processes", "now", "was_bound", "bound"),
    [
        # One that was started meanwhile is ours.
        (Processes(10, 11), Processes(20, 21), False, True),
        # While it is away all stays as it was.
        (Processes(10, 11), None, False, False),
        (Processes(10, 11), None, True, True),
        # Before it has ever run the socket is another process's.
        (None, None, False, False),
    ],
)
async def test_a_foreign_socket_is_compared_with_the_haproxy_of_now(
    rig: _Rig, processes: Processes | None, now: Processes | None, *, was_bound: bool, bound: bool
) -> None:
    rig.haproxy.bound = UnixBind(str(rig.path), "0644", 0, 0) if was_bound else None
    rig.haproxy.processes, rig.haproxy.now = processes, now
    rig.seen, rig.seen_by[20] = _AGENT, _OURS
    assert await rig.choose() == (bound, False)


async def test_what_haproxy_refuses_is_left_out_and_tried_again_ever_more_slowly(rig: _Rig) -> None:
    waited: list[float] = []
    for _ in range(6):
        assert await rig.choose() == (True, False)
        assert rig.unix.disable_if_rejected(rig.refusal())
        began = rig.clock.time
        while not (await rig.choose())[0]:
            assert "cannot bind" in rig.reason
            rig.clock.time += 1
        waited.append(rig.clock.time - began)
    assert waited == [5, 10, 20, 40, 60, 60]


async def test_other_settings_are_tried_at_once_and_other_refusals_do_not_count(rig: _Rig) -> None:
    other = ReloadFailed("[ALERT] for frontend guests: cannot bind [169.254.169.254:80]")
    await rig.unix.choose()
    assert not rig.unix.disable_if_rejected(other)
    assert rig.unix.disable_if_rejected(rig.refusal())
    refused = rig.settings
    rig.settings = refused.model_copy(update={"mode": "all"})
    await rig.unix.choose()
    assert rig.unix.bind == UnixBind(str(rig.path), "0666", 0, 0)
    assert rig.unix.disable_if_rejected(rig.refusal())
    rig.clock.time += 5
    assert await rig.choose() == (True, False), "the delay begins anew"
    rig.settings = refused
    assert await rig.choose() == (True, False), "what was refused before them is tried anew"


async def test_an_account_that_is_not_there_leaves_it_out(rig: _Rig) -> None:
    for name in ("user", "group", "proxy_group"):
        rig.configure(**{name: "4294967295" if name == "proxy_group" else "imdst-none"})
        assert await rig.choose() == (False, False)
        assert ("too large" if name == "proxy_group" else "there is no") in rig.reason


async def test_the_owner_is_the_directorys_if_no_setting_says_another(tmp_path: Path) -> None:
    rig = _Rig(tmp_path, proxy_user="64999")
    rig.path.parent.mkdir()
    os.chown(rig.path.parent, 64999, 64998)
    await rig.unix.choose()
    assert rig.unix.bind == UnixBind(str(rig.path), "0644", 64999, 64998)


def test_only_a_path_that_a_configuration_binds_and_no_process_listens_on_is_swept(
    tmp_path: Path,
) -> None:
    path, config = tmp_path / "a@b+c-d_e.g", tmp_path / "haproxy.cfg"
    for state in (SocketState.FOREIGN, SocketState.STALE):
        path.touch()
        for bind in (None, UnixBind(str(path), "0644", 0, 0)):
            sweep_unix_socket(config, lambda _path, _pids: SeenSocket(state))  # noqa: B023 - called at once
            assert path.exists(), "there is no configuration, or none with a socket"
            config.write_text(_config(bind))
        sweep_unix_socket(config, lambda _path, _pids: SeenSocket(state))  # noqa: B023 - as above
        assert path.exists() == (state is SocketState.FOREIGN)
        config.unlink()


# A path that a running process has: taken over where the settings say so, ever more seldom


@pytest.mark.parametrize(
    ("times", "pause"),
    [
        ((0, 1), 0),
        ((0, 1, 2), 15),
        ((0, 30, 59), 15),
        # As an agent that is started again now and then.
        ((0, 60, 120, 180, 240), 0),
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
    takeovers = Takeovers()
    for one in times:
        takeovers.note(one)
    assert takeovers.pause_s == pause


def test_a_fight_comes_down_to_one_taking_in_ten_minutes_and_no_fewer() -> None:
    takeovers, now, taken = Takeovers(), 0.0, []
    for _ in range(20):
        now += takeovers.pause_left_s(now) or 1.0
        takeovers.note(now)
        taken.append(now)
    pauses = [after - before for before, after in pairwise(taken)]
    assert pauses[:9] == [1, 1, 15, 30, 60, 120, 240, 480, 600]
    assert set(pauses[8:]) == {600}


async def test_a_takeover_is_logged_once_with_the_process(taking: _Rig) -> None:
    with capture_logs() as logs:
        assert await taking.round()
        for _ in range(3):
            assert await taking.round()
    (line,) = logs
    assert (line["event"], line["log_level"]) == ("unix listener taken over", "info")
    assert line["taken_from"] == taking.unix.taken_from == "neutron-ovn-met (pid 77)"
    assert (taking.unix.taken_over, taking.unix.problem) == (1, None)


async def test_a_process_that_takes_it_back_each_time_keeps_it_for_a_while(taking: _Rig) -> None:
    await taking.round()
    assert await taking.lose()
    assert await taking.lose()
    assert not await taking.lose()
    (before, count) = (taking.reason, taking.unix.taken_over)
    assert before.startswith(
        f"neutron-ovn-met (pid 77) listens on {taking.path}, and took the path back"
    )
    assert "15 s" in before
    assert taking.unix.bind is None
    # The same text: what is logged already is not logged again.
    taking.clock.time += 10
    assert not await taking.round()
    assert (taking.reason, taking.unix.taken_over) == (before, count)
    taking.clock.time += 5
    assert await taking.round()
    assert (taking.reason, taking.unix.taken_over) == ("", count + 1)
    assert not await taking.lose()
    assert "30 s" in taking.reason
    # A path that comes free is bound at once.
    taking.seen = SeenSocket(SocketState.STALE)
    assert await taking.choose() == (True, False)


@pytest.mark.parametrize("refused", [False, True])
async def test_what_haproxy_did_not_take_does_not_count(taking: _Rig, *, refused: bool) -> None:
    await taking.unix.choose()
    if refused:
        assert taking.unix.disable_if_rejected(taking.refusal())
    else:
        # Something else kept it back; then HAProxy is started anew with what it had.
        taking.haproxy.bound, taking.haproxy.now = taking.unix.bind, None
        await taking.unix.choose()
    await taking.unix.settle(None)
    assert (taking.unix.taken_over, taking.unix.taken_from) == (0, "")


async def test_once_the_setting_is_off_a_running_process_keeps_the_path(taking: _Rig) -> None:
    await taking.round()
    taking.configure(take_over=False)
    assert await taking.round(), "ours stays ours"
    assert not await taking.lose()
    assert (taking.unix.bind, taking.unix.rebind, taking.unix.taken_over) == (None, False, 1)


async def test_a_file_that_was_bound_while_we_looked_is_not_removed(taking: _Rig) -> None:
    await taking.round()

    def look(path: Path, our_pids: Collection[int]) -> SeenSocket:
        del our_pids
        path.with_name("new").write_text("the agent's")
        path.with_name("new").rename(path)
        return _OURS

    taking.unix.look = look
    taking.configure(enabled=False)
    await taking.unix.choose()
    await taking.unix.settle(str(taking.path))
    assert [one.read_text() for one in taking.path.parent.iterdir()] == ["the agent's"]
