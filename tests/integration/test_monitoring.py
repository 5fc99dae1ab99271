"""Alerts, dashboard and the page about both, with a real Prometheus that scrapes real daemons."""

import contextlib
import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Final
from xml.etree import ElementTree as ET

import pytest

from support.charts import SCHEMES, Panel, draw
from support.daemon import instance
from support.dashboards import filled_in, layout_faults, without_data
from support.demonstration import REPOSITORY
from support.faults import TOGETHER
from support.guest import Guest, Lost
from support.lab import until
from support.monitored import Monitored, open_monitored
from support.pages import code_blocks
from support.prometheus import RULES, alerts, promtool

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(600)]

_WITHIN_S: Final = 60.0
"""The controller reads Nova's state every ten seconds, other counters when Prometheus asks."""

_PAGE: Final = REPOSITORY / "docs/how-to/monitor.md"
_DASHBOARD: Final = REPOSITORY / "packaging/grafana/imdsproxy.json"


_IMAGES: Final = {one: REPOSITORY / f"docs/images/monitor-{one}.svg" for one in SCHEMES}
_SHOWN: Final = (
    "Requests by status",
    "Time until a change is in force",
    "Look-ups of unknown addresses",
    "Refused for want of a token",
)
"""Panels that the page shows. Draw them anew with `IMAGES=write script/test tests/integration/test_monitoring.py`."""

_SHOWN_S: Final = 90.0


@pytest.fixture(scope="module")
def host() -> Iterator[Monitored]:
    with open_monitored() as one:
        yield one


# The daemon reads its counters for each of five scrapes a second; beside other tests, scrapes would take too long.
@pytest.mark.alone
def test_each_alert_fires_when_its_fault_is_there(host: Monitored) -> None:
    missing: list[str] = []
    for faults in TOGETHER:
        wanted = {name for fault in faults for name in fault.alerts}
        began = time.monotonic()

        def left(wanted: set[str] = wanted, began: float = began) -> set[str]:
            return wanted - host.prometheus.fired(time.monotonic() - began)

        with contextlib.ExitStack() as stack:
            for fault in faults:
                stack.enter_context(fault.cause(host))
            with contextlib.suppress(AssertionError):
                until(lambda left=left: not left(), within_s=_WITHIN_S)  # type: ignore[misc] # as above
            missing += sorted(left())
    assert missing == []


def test_no_alert_is_without_its_fault() -> None:
    caused = [name for faults in TOGETHER for fault in faults for name in fault.alerts]
    # Those of a fleet have theirs in test_fleet_monitoring.py.
    files = [one for one in RULES.glob("*.rules.yml") if one.name != "imdsproxy-fleet.rules.yml"]
    assert sorted(caused) == sorted(one.name for file in files for one in alerts(file))


@pytest.mark.always
def test_each_query_of_the_dashboard_has_data(host: Monitored) -> None:
    for guest in host.world.guests.values():
        guest.ask("/latest/meta-data/instance-id")
    board = json.loads(_DASHBOARD.read_text())
    assert without_data(board, host.prometheus, within_s=_WITHIN_S) == set()


def test_panels_of_the_dashboard_are_drawn_for_the_page(host: Monitored) -> None:
    board = json.loads(_DASHBOARD.read_text())
    shown = {one["title"]: one for one in board["panels"]}
    written = os.environ.get("IMAGES") == "write"
    if written:
        _be_used(host, for_s=_SHOWN_S)
    for guest in host.world.guests.values():
        _ask(guest)
    host.world.reload()
    panels = []
    for title in _SHOWN:
        unit = shown[title]["fieldConfig"]["defaults"]["unit"]
        lines = {
            name: line
            for target in shown[title]["targets"]
            for name, line in host.prometheus.lines(
                filled_in(target["expr"]), target["legendFormat"], _SHOWN_S
            ).items()
            if line
        }
        assert lines, title
        panels.append(Panel(title, unit, lines))
    for scheme, image in _IMAGES.items():
        drawn = draw(panels, scheme)
        assert ET.fromstring(drawn).tag.endswith("svg")  # noqa: S314 - our own
        assert drawn.count("<polyline") >= len(_SHOWN)
        if written:
            image.write_text(drawn)
        assert f'"../images/{image.name}"' in _PAGE.read_text()
        # As it was drawn the last time, of the same panels.
        assert all(title in image.read_text() for title in _SHOWN)


def _be_used(host: Monitored, for_s: float) -> None:
    """Load the host as an ordinary one: guests read, one without its token, records change, and unknown guests ask."""
    policy = {"networks": {"grey": {"tokens": "required"}}}
    host.daemon.reconfigure(host.settings(policy=policy))
    strangers = [host.world.lab.guest("red", 100 + number) for number in range(2)]
    ends = time.monotonic() + for_s
    with ThreadPoolExecutor(len(strangers)) as pool:
        asked: list[Future[None]] = []
        for number in count():
            for guest in host.world.guests.values():
                if guest.network != "grey" or number % 20 == 0:
                    _ask(guest)
            if all(one.done() for one in asked):
                asked = [pool.submit(_ask, guest) for guest in strangers]
            if number % 10 == 0:
                host.daemon.put(instances=[instance("changed", "red", 78 + number // 10 % 2)])
            if time.monotonic() > ends:
                break
    host.daemon.remove_instance("changed")
    host.daemon.reconfigure(host.settings())
    for guest in strangers:
        host.world.lab.remove_guest(guest)


def _ask(guest: Guest) -> None:
    with contextlib.suppress(Lost):
        guest.ask("/latest/meta-data/instance-id")


def test_the_dashboard_lists_the_hosts_and_its_panels_do_not_overlap(host: Monitored) -> None:
    board = json.loads(_DASHBOARD.read_text())
    variables = {one["name"]: one["query"] for one in board["templating"]["list"]}
    found = re.fullmatch(r"label_values\((\w+), (\w+)\)", variables["instance"])
    assert found is not None
    labels = host.prometheus.get(f"label/{found[2]}/values", **{"match[]": found[1]})
    assert labels == ["127.0.0.1:9465", "127.0.0.1:9475"]
    assert layout_faults(board) == []


def test_the_commands_of_the_page_do_what_it_says(host: Monitored, tmp_path: Path) -> None:
    blocks = [one.text for one in code_blocks(_PAGE)]
    (settings,) = (one for one in blocks if "scrape_configs" in one)
    (check,) = (one for one in blocks if "promtool" in one)
    for file in RULES.glob("*.yml"):
        (tmp_path / file.name).write_text(file.read_text())
    (tmp_path / "prometheus.yml").write_text(settings.replace("/etc/prometheus", str(tmp_path)))
    checked = promtool(*check.replace("/etc/prometheus", str(tmp_path)).split()[1:])
    assert "SUCCESS" in checked
    (percentile,) = (one for one in blocks if "audit.log" in one)
    host.world.red.ask("/latest/meta-data/instance-id")
    command = percentile.replace("/var/log/imdsproxy", str(host.daemon.directory / "log"))

    def printed() -> str:
        done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)  # noqa: S602 - the page's
        return done.stdout.strip()

    # A line of the log is written a moment after its request.
    until(lambda: printed().isdecimal(), what="a percentile")
