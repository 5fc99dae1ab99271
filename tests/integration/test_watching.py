"""`imdsproxy watch` beside a daemon whose guests ask."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.audit_log import AuditLog, order_audit
from support.lab import until
from support.world import World, own

pytestmark = pytest.mark.root


@dataclass(frozen=True, slots=True)
class Watcher:
    """A genuine `imdsproxy watch --json`, and what it has printed."""

    process: subprocess.Popen[bytes]
    printed: Path

    def saw(self, **wanted: object) -> bool:
        """Whether a request was shown that has these."""
        lines = map(json.loads, self.printed.read_text().splitlines())
        return any(wanted.items() <= one.items() for one in lines)


@contextmanager
def watching(world: World, *flags: str) -> Iterator[Watcher]:
    """From when it is known to see what guests ask."""
    printed = world.daemon.directory / "watched"
    words = ("--config", str(world.daemon.config), "watch", "--json", *flags)
    with printed.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "imdsproxy", *words], stdout=sink, env={"PATH": os.defpath}
        )
    watcher = Watcher(process, printed)
    try:
        until(world.is_watched, what="HAProxy tells of requests")
        probe = "/latest/meta-data/instance-id"
        until(lambda: world.red.ask(probe).status and watcher.saw(), what="a request is shown")
        yield watcher
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(10)


@pytest.mark.slow
def test_each_guests_requests_are_shown_with_who_asks_and_who_answered(world: World) -> None:
    stranger = world.lab.guest("red", 66)
    with watching(world, "--network", "red") as watcher:
        assert own(world.red, world.red.ask("/latest/user-data")) is None
        assert own(world.red, world.red.ask("/latest/user-data")) is None
        assert world.red.ask("/openstack/latest/meta_data.json").status == 200
        assert stranger.ask("/latest/meta-data/").status == 404
        red = {"network": "red", "address": world.red.addresses[0], "instance": "red-5"}
        until(lambda: watcher.saw(**red, path="/latest/user-data", answered_by="cache"))
        path = "/openstack/latest/meta_data.json"
        until(lambda: watcher.saw(**red, method="GET", path=path, answered_by="documents"))
        unknown = {"address": stranger.addresses[0], "instance": None, "status": 404}
        until(lambda: watcher.saw(**unknown, answered_by="resolver"))
        assert not watcher.saw(missed=True)


def test_it_goes_on_over_a_reload_and_beside_the_audit_log(world: World) -> None:
    with watching(world) as watcher:
        log = AuditLog(world.daemon)
        order_audit(world, "all")
        world.reload()
        path = "/latest/meta-data/after-the-reload"
        world.red.ask(path)
        until(lambda: watcher.saw(path=path, network="red", instance="red-5"))
        log.wait(path=path, network="red", instance="red-5")


@pytest.mark.slow
def test_haproxy_tells_no_more_when_the_watcher_was_killed(world: World) -> None:
    with watching(world) as watcher:
        watcher.process.kill()
        until(lambda: not world.is_watched(), within_s=20, what="HAProxy has stopped telling")
    world.all_right()
