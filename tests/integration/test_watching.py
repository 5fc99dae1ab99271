"""`imdsproxy watch` beside a daemon whose guests ask."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from support.audit_log import AuditLog, order_audit
from support.lab import until
from support.world import World, own

pytestmark = pytest.mark.root


class Watcher:
    """A genuine `imdsproxy watch --json`, and what it has printed."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[dict[str, Any]] = []
        self.text = ""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def saw(self, **wanted: object) -> bool:
        """Whether a request was told of which has these."""
        return any(wanted.items() <= one.items() for one in list(self.lines))

    def end(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait(10)
        self._thread.join(10)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.text += line
            self.lines.append(json.loads(line))
        self.process.stdout.close()


@contextmanager
def watching(world: World, *flags: str) -> Iterator[Watcher]:
    """From when it is known to see what guests ask."""
    arguments = ("--config", str(world.daemon.config), "watch", "--json", *flags)
    process = subprocess.Popen(
        [sys.executable, "-m", "imdsproxy", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={"PATH": os.defpath},
    )
    watcher = Watcher(process)
    try:
        until(world.is_watched, what="HAProxy tells of requests")
        probe = "/latest/meta-data/instance-id"
        until(lambda: world.red.ask(probe).status and watcher.lines, what="a request is shown")
        yield watcher
    finally:
        watcher.end()


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
