"""A configuration comes into force, or the one before stays and HAProxy's alerts are reported."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from imdsproxy.errors import ConfigRejected, HostRefused, ReloadFailed
from imdsproxy.haproxy import process as module
from imdsproxy.haproxy.launch import Launcher, find_alerts
from imdsproxy.haproxy.layout import Layout
from imdsproxy.haproxy.process import Haproxy
from imdsproxy.haproxy.records import RecordApplier
from imdsproxy.haproxy.rules.config import render_config
from imdsproxy.haproxy.rules.model import Bind, DataplaneSpec, Limits
from imdsproxy.host.clock import Clock
from imdsproxy.model.entities import NetworkId
from support.fake_haproxy import FakeHaproxy, FakeLauncher, control_fake
from support.full_disk import full_disk

_ACCEPTS = "#!/bin/sh\nexit 0\n"
_REFUSES = "#!/bin/sh\necho '[NOTICE] hello' >&2\necho '[ALERT] unknown keyword' >&2\nexit 1\n"


@dataclass
class Rig:
    layout: Layout
    fake: FakeHaproxy
    launcher: FakeLauncher
    haproxy: Haproxy

    def spec(self, *networks: str) -> DataplaneSpec:
        binds = tuple(Bind(NetworkId(one), IPv4Address("169.254.169.254"), 80) for one in networks)
        return DataplaneSpec(binds, self.layout.haproxy_paths())

    async def apply(self, *networks: str) -> str | None:
        return await self.haproxy.apply(self.spec(*networks), "a test")

    def judge(self, script: str) -> None:
        """The output of `haproxy -c` from now on."""
        Path(self.haproxy.program).write_text(script)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    layout = Layout(tmp_path, tmp_path, chroot=False)
    fake, launcher, haproxy = control_fake(layout, _ACCEPTS)
    yield Rig(layout, fake, launcher, haproxy)
    await fake.close()


async def test_the_first_configuration_starts_haproxy_which_is_the_check(rig: Rig) -> None:
    assert not await rig.haproxy.adopt()
    assert not rig.haproxy.starting.is_set()
    rig.judge(_REFUSES)
    assert await rig.apply("red") == "started"
    assert rig.haproxy.starting.is_set()
    assert not rig.layout.candidate.exists()
    assert "name red" in rig.layout.config.read_text()
    assert rig.haproxy.last_reload is not None
    assert rig.haproxy.last_reload.ok
    assert not await rig.apply("red")
    assert (rig.launcher.started, rig.fake.reloads) == (1, 0)


async def test_another_configuration_is_a_reload_with_known_workers(rig: Rig) -> None:
    await rig.apply("red")
    assert await rig.apply("red", "blue") == "reloaded"
    assert rig.fake.reloads == 1
    assert rig.haproxy.processes is not None
    assert set(rig.haproxy.processes.workers) == rig.haproxy.records.known
    assert rig.haproxy.reload_counts == {"ok": 2, "failed": 0}


async def test_a_look_at_workers_that_hangs_keeps_none_from_being_replaced(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BEFORE_RELOAD_S", 0.05)
    looked: list[str] = []

    async def hang() -> None:
        await asyncio.Event().wait()

    async def look() -> None:
        looked.append("after it")

    rig.haproxy.before_reload += [hang, look]
    await rig.apply("red")
    assert await rig.apply("red", "blue") == "reloaded"
    assert looked == ["after it"]


async def test_what_haproxy_refuses_never_replaces_what_is_in_force(rig: Rig) -> None:
    await rig.apply("red")
    good = rig.layout.config.read_text()
    rig.judge(_REFUSES)
    with pytest.raises(ConfigRejected, match="unknown keyword") as caught:
        await rig.apply("red", "blue")
    assert "hello" not in caught.value.message
    assert rig.layout.config.read_text() == good
    assert "name blue" in rig.layout.rejected.read_text()
    assert rig.fake.reloads == 0
    assert rig.haproxy.last_reload is not None
    assert (rig.haproxy.last_reload.ok, rig.haproxy.last_reload.result) == (
        False,
        "unknown keyword",
    )
    assert rig.haproxy.reload_counts == {"ok": 1, "failed": 1}
    rig.judge(_ACCEPTS)
    assert await rig.apply("red", "blue")


async def test_a_reload_that_fails_puts_the_last_good_file_back(rig: Rig) -> None:
    await rig.apply("red")
    good = rig.layout.config.read_text()
    rig.fake.refuse_reload = "[NOTICE] reloading\n[ALERT] cannot bind socket"
    with pytest.raises(ReloadFailed, match="cannot bind socket"):
        await rig.apply("red", "blue")
    assert rig.layout.config.read_text() == good
    assert "name blue" in rig.layout.rejected.read_text()
    rig.fake.refuse_reload = ""
    assert await rig.apply("red", "blue")


async def test_a_start_that_fails_says_why_and_is_tried_again(rig: Rig) -> None:
    rig.launcher.refuse = "[ALERT] no such group"
    with pytest.raises(ConfigRejected, match="no such group"):
        await rig.apply("red")
    assert rig.haproxy.processes is None
    assert "name red" in rig.layout.rejected.read_text()
    assert rig.haproxy.last_reload is not None
    assert not rig.haproxy.last_reload.ok
    rig.launcher.refuse = ""
    assert await rig.apply("red")
    rig.launcher.refuse = "no room"
    with pytest.raises(ConfigRejected):
        await rig.haproxy.restart("haproxy ended")
    assert rig.haproxy.processes is None


async def test_a_master_that_runs_already_is_adopted_with_its_configuration(rig: Rig) -> None:
    await rig.apply("red")
    records = RecordApplier(rig.layout)
    successor = Haproxy(rig.haproxy.program, rig.haproxy.launcher, records, Clock())
    assert await successor.adopt()
    assert not await successor.apply(rig.spec("red"), "start")
    assert rig.launcher.started == 1
    assert rig.fake.reloads == 0


async def test_a_master_whose_records_are_lost_is_ended(rig: Rig) -> None:
    await rig.haproxy.end_stray()
    assert rig.launcher.killed == []
    await rig.fake.start()
    await rig.haproxy.end_stray()
    assert len(rig.launcher.killed) == 1


async def test_a_disk_that_takes_nothing_leaves_the_file_in_force(rig: Rig) -> None:
    await rig.apply("red")
    with full_disk(), pytest.raises(HostRefused):
        await rig.apply("blue")
    assert "name red" in rig.layout.config.read_text()
    assert rig.fake.reloads == 0


@pytest.mark.parametrize("maxconn", [7890, None])
def test_the_master_gets_the_connections_of_its_configuration(
    tmp_path: Path, maxconn: int | None
) -> None:
    layout = Layout(tmp_path, tmp_path)
    if maxconn is not None:
        limits = Limits(maxconn=maxconn, maxconn_per_network=50)
        spec = DataplaneSpec(binds=(), paths=layout.haproxy_paths(), limits=limits)
        layout.config.write_text(render_config(spec))
    words = Launcher("haproxy", None, layout).arguments()
    # Without a configuration there is room for thousands of namespaces.
    assert words[words.index("-n") + 1] == str(maxconn or 4096)


_UNIT = "imdsproxy-haproxy.service"
_STARTING = f"Starting {_UNIT} - imdsproxy: HAProxy, answering every guest...\n"


@pytest.mark.parametrize(
    ("journal", "alerts"),
    [
        (
            (
                f"{_STARTING}[ALERT]    (10) : config : an older reason\n{_STARTING}"
                "[NOTICE]   (20) : New worker (21) forked\n"
                "[ALERT]    (21) : Binding for frontend exporter: cannot bind\n"
                "[ALERT]    (20) : Binding for frontend exporter: cannot bind\n"
                "[ALERT]    (20) : [haproxy.main()] Some protocols failed to start"
            ),
            (
                "Binding for frontend exporter: cannot bind; "
                "[haproxy.main()] Some protocols failed to start"
            ),
        ),
        # The last start has written nothing yet.
        (f"{_STARTING}[ALERT]    (10) : the reason\n{_STARTING}", "the reason"),
        (f"{_STARTING}[ALERT] (10) : Starting frontend guests: no", "Starting frontend guests: no"),
        ("", ""),
        ("-- No entries --", ""),
        (f"{_STARTING}[NOTICE] (1) : x", ""),
    ],
)
def test_the_alerts_of_the_last_start_are_found_in_the_journal_without_pids_and_once(
    journal: str, alerts: str
) -> None:
    assert find_alerts(journal, _UNIT) == alerts
