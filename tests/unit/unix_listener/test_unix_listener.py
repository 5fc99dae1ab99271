"""What HAProxy is to bind for Neutron's proxies, decided by what is at the path and by its answers before."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from imdsproxy.core.haproxy.config import render_config
from imdsproxy.core.haproxy.model import DataplaneSpec, UnixBind
from imdsproxy.core.haproxy.runtime import Processes
from imdsproxy.core.hoststate import SeenSocket, SocketOwner, SocketState
from imdsproxy.dataplane.layout import Layout
from imdsproxy.errors import DataplaneError, ReloadFailed, RuntimeUnavailable
from imdsproxy.unix_listener.listener import UnixListener, bound_path, sweep_unix_socket
from imdsproxy.unix_listener.settings import UnixListenerSettings

_FOREIGN = SeenSocket(SocketState.FOREIGN, (SocketOwner(77, "neutron-metadat"),))
_OURS = SeenSocket(SocketState.OURS)


@dataclass
class _Haproxy:
    """A master with one worker, and its processes."""

    processes: Processes | None = field(default_factory=lambda: Processes(10, 11))
    now: Processes | None = None
    config: str = ""

    def __post_init__(self) -> None:
        self.lock = asyncio.Lock()
        self.records = self
        self.master = self

    async def read_processes(self) -> Processes:
        assert self.lock.locked(), "it may just be starting"
        if self.now is None:
            raise RuntimeUnavailable("no answer")
        return self.now

    def in_force(self) -> str:
        return self.config


@dataclass
class _Clock:
    seconds: float = 0.0

    def monotonic(self) -> float:
        return self.seconds


class _Rig:
    def __init__(self, directory: Path, **fields: object) -> None:
        self.path = directory / "agents" / "metadata_proxy"
        self.settings = UnixListenerSettings.model_validate(
            {"enabled": True, "path": str(self.path), **fields}
        )
        self.haproxy = _Haproxy()
        self.clock = _Clock()
        self.seen = SeenSocket(SocketState.MISSING)
        self.seen_by: dict[int, SeenSocket] = {}
        self.unix = UnixListener(
            lambda: self.settings,
            self.haproxy,  # type: ignore[arg-type]  # the part that is used
            self.look,
            self.clock,  # type: ignore[arg-type]  # as above
        )

    def look(self, path: Path, our_pids: Collection[int]) -> SeenSocket:
        del path
        return next((self.seen_by[pid] for pid in our_pids if pid in self.seen_by), self.seen)

    def configure(self, bind: UnixBind | None) -> None:
        """What HAProxy runs with."""
        layout = Layout(Path("/run/imdsproxy"), Path("/var/lib/imdsproxy"))
        self.haproxy.config = render_config(DataplaneSpec((), layout.haproxy_paths(), unix=bind))

    def bound(self) -> bool:
        return self.unix.bind is not None

    @property
    def reason(self) -> str:
        return "" if self.unix.problem is None else self.unix.problem.reason

    def refusal(self) -> DataplaneError:
        return ReloadFailed(f"[ALERT] for frontend agents: cannot bind [{self.path}].")


@pytest.fixture
def rig(tmp_path: Path) -> _Rig:
    return _Rig(tmp_path)


async def test_off_is_nothing_to_bind_and_no_problem(tmp_path: Path) -> None:
    rig = _Rig(tmp_path, enabled=False)
    await rig.unix.choose()
    assert (rig.unix.bind, rig.unix.problem) == (None, None)
    assert not rig.unix.changed()
    assert not rig.path.parent.exists()


@pytest.mark.parametrize("state", [SocketState.MISSING, SocketState.STALE, SocketState.OURS])
async def test_a_path_that_is_free_or_ours_is_bound(rig: _Rig, state: SocketState) -> None:
    rig.seen = SeenSocket(state)
    await rig.unix.choose()
    assert rig.unix.bind == UnixBind(str(rig.path), "0644", 0, 0)
    assert (rig.unix.rebind, rig.unix.problem) == (False, None)


async def test_a_socket_that_nobody_reaches_any_more_is_let_go_of_first(rig: _Rig) -> None:
    rig.seen = SeenSocket(SocketState.MISSING, orphaned=True)
    await rig.unix.choose()
    assert (rig.unix.bind is not None, rig.unix.rebind) == (True, True)
    rig.seen = SeenSocket(SocketState.FOREIGN, orphaned=True)
    rig.haproxy.now = rig.haproxy.processes
    await rig.unix.choose()
    assert (rig.unix.bind, rig.unix.rebind) == (None, False)


async def test_a_stranger_is_told_of_by_name_and_pid(rig: _Rig) -> None:
    rig.seen = _FOREIGN
    rig.haproxy.now = rig.haproxy.processes
    await rig.unix.choose()
    assert rig.unix.bind is None
    assert f"neutron-metadat (pid 77) listens on {rig.path}" in rig.reason


async def test_a_haproxy_that_was_started_meanwhile_is_no_stranger(rig: _Rig) -> None:
    rig.seen = _FOREIGN
    rig.haproxy.now = Processes(20, 21)
    rig.seen_by[20] = _OURS
    await rig.unix.choose()
    assert rig.unix.bind is not None


@pytest.mark.parametrize("bound", [False, True])
async def test_while_haproxy_is_away_all_stays_as_it_was(rig: _Rig, *, bound: bool) -> None:
    rig.configure(UnixBind(str(rig.path), "0644", 0, 0) if bound else None)
    rig.seen = _FOREIGN
    await rig.unix.choose()
    assert (rig.unix.bind is not None) == bound


async def test_before_haproxy_has_ever_run_a_stranger_is_one(rig: _Rig) -> None:
    rig.haproxy.processes = None
    rig.seen = _FOREIGN
    await rig.unix.choose()
    assert rig.unix.bind is None
    assert "pid 77" in rig.reason


async def test_what_haproxy_refuses_is_left_out_and_tried_again_ever_more_slowly(rig: _Rig) -> None:
    waited: list[float] = []
    for _ in range(6):
        await rig.unix.choose()
        assert rig.bound()
        assert rig.unix.blame(rig.refusal())
        began = rig.clock.seconds
        while not rig.bound():
            assert "cannot bind" in rig.reason
            rig.clock.seconds += 1
            await rig.unix.choose()
        waited.append(rig.clock.seconds - began)
    assert waited == [5, 10, 20, 40, 60, 60]


async def test_other_settings_are_tried_at_once(rig: _Rig) -> None:
    await rig.unix.choose()
    assert rig.unix.blame(rig.refusal())
    rig.settings = rig.settings.model_copy(update={"mode": "all"})
    await rig.unix.choose()
    assert rig.unix.bind == UnixBind(str(rig.path), "0666", 0, 0)


async def test_what_is_wrong_with_others_is_not_its_fault(rig: _Rig) -> None:
    other = ReloadFailed("[ALERT] for frontend guests: cannot bind [169.254.169.254:80]")
    assert not rig.unix.blame(other)
    await rig.unix.choose()
    assert not rig.unix.blame(other)
    assert rig.unix.bind is not None


@pytest.mark.parametrize(
    "fields",
    [{"user": "imdst-none"}, {"group": "imdst-none"}, {"proxy_group": "4294967295"}],
    ids=str,
)
async def test_an_account_that_is_not_there_leaves_it_out(
    tmp_path: Path, fields: dict[str, object]
) -> None:
    rig = _Rig(tmp_path, **fields)
    await rig.unix.choose()
    assert rig.unix.bind is None
    assert "there is no" in rig.reason


async def test_the_owner_is_the_directorys_if_no_setting_says_another(tmp_path: Path) -> None:
    rig = _Rig(tmp_path, proxy_user="64999")
    rig.path.parent.mkdir()
    os.chown(rig.path.parent, 64999, 64998)
    await rig.unix.choose()
    assert rig.unix.bind == UnixBind(str(rig.path), "0644", 64999, 64998)


def test_the_path_is_found_in_a_configuration_again() -> None:
    layout = Layout(Path("/run/imdsproxy"), Path("/var/lib/imdsproxy"))
    spec = DataplaneSpec((), layout.haproxy_paths())
    assert bound_path(render_config(spec)) is None
    for path in ("/var/lib/neutron/metadata_proxy", "/a@b+c-d/e_f.g"):
        bind = UnixBind(path, "0644", 0, 0)
        assert bound_path(render_config(DataplaneSpec((), spec.paths, unix=bind))) == path


@pytest.mark.parametrize(
    ("state", "kept"), [(SocketState.STALE, False), (SocketState.FOREIGN, True)]
)
def test_only_what_nobody_listens_on_is_swept(
    tmp_path: Path, state: SocketState, *, kept: bool
) -> None:
    path, config = tmp_path / "metadata_proxy", tmp_path / "haproxy.cfg"
    path.touch()
    sweep_unix_socket(config, lambda _path, _pids: SeenSocket(state))
    config.write_text(f"frontend agents\n  bind unix@{path} name agents mode 0644\n")
    sweep_unix_socket(config, lambda _path, _pids: SeenSocket(state))
    assert path.exists() == kept
