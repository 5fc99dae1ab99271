"""docs/how-to/fleet.md, followed to the letter on seven machines: from Debian's packages to a restored fleet."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Final

import pytest

from imdsproxy.cli.options import NOT_IN_FORCE
from support.fleet_page import (
    HOSTS,
    HUBS,
    MEMBERS,
    PAGE,
    FleetMachines,
    open_fleet_machines,
    placed_blocks,
    table_of,
)
from support.guest import Guest, Load, Reply
from support.lab import until

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(1800)]

_HUB: Final = "imdsproxy-hub"
_UNITS: Final = ("imdsproxy", "imdsproxy-haproxy", "imdsproxy-documents")
_HOSTNAME: Final = "/latest/meta-data/hostname"
# Without a token where the page requires them.
_META_DATA: Final = "/openstack/latest/meta_data.json"
_TOKEN: Final = "/latest/api/token"
_UNAVAILABLE: Final = 69
_NUMBERS: Final = count(1)


def test_a_fleet_is_made_operated_and_restored_as_the_page_says(tmp_path: Path) -> None:
    with open_fleet_machines(tmp_path) as fleet:
        fleet.words["name=etcd1"] = "name={machine}"
        fleet.follow("## etcd")
        fleet.follow("## Hubs")
        _join_hosts(fleet)
        _place_and_move(fleet)
        _take_away(fleet)
        _restore(fleet)
        fleet.follow("## Remove a host")
        _check_removed(fleet)
        with _nothing_lost(fleet):
            fleet.follow("## Upgrade")
        fleet.follow("## Remove a hub")
        assert "hub2" not in _status(fleet)
        assert fleet.ran == [one.block.line for one in placed_blocks(_title())]
        assert fleet.replaced == fleet.words.keys()


def test_each_block_says_where_it_is_run_and_each_line_of_the_table_is_caused() -> None:
    machines = {name for one in placed_blocks(_title()) for name in one.machines}
    assert machines == {*MEMBERS, *HUBS, *HOSTS}
    assert [row[0] for row in table_of("## When something is away")] == list(_AWAY)


def _title() -> str:
    return PAGE.read_text().partition("\n")[0]


def _join_hosts(fleet: FleetMachines) -> None:
    fleet.follow("## Hosts", 0)
    fleet.words["STRING"] = fleet.follow("## Hosts", 1).strip()
    fleet.follow("## Hosts", 2, 3)
    until(lambda: _hosts(fleet).count("connected") == len(HOSTS), within_s=30, what="both connect")
    fleet.follow("## Hosts", 4)


def _place_and_move(fleet: FleetMachines) -> None:
    old, new = (fleet.guest(name) for name in HOSTS)
    fleet.follow("## Records", 0, 1)
    printed = fleet.follow("## Records", 2)
    (fleet.words["REVISION"],) = re.findall(r'"revision": (\d+)', printed)
    fleet.follow("## Records", 3)
    token = old.ask(
        _TOKEN, method="PUT", headers=["X-aws-ec2-metadata-token-ttl-seconds: 600"]
    ).text
    shown = [f"X-aws-ec2-metadata-token: {token}"]
    fleet.follow("### Move", 0)
    assert [one.ask(_HOSTNAME, headers=shown).text for one in (old, new)] == ["www", "www"]
    fleet.follow("### Move", 1)
    # Who asks on is answered for a minute, and not with the instance's documents.
    assert old.ask(_HOSTNAME, headers=shown).status == 404
    assert new.ask(_HOSTNAME, headers=shown).text == "www"
    fleet.follow("### Policies and tokens")
    assert new.ask(_HOSTNAME, headers=shown).status == new.ask(_HOSTNAME).status == 401
    for bridge in ("br-shop", "br-shop2"):
        for name in HOSTS:
            fleet.machines[name].run("ip", "link", "add", bridge, "up", "type", "bridge")
    fleet.follow("### Projects")


def _hosts(fleet: FleetMachines) -> str:
    return fleet.machines["hub1"].run("imdsproxy", "fleet", "hosts")


def _status(fleet: FleetMachines) -> str:
    return fleet.machines["hub1"].run("imdsproxy", "fleet", "status")


def _change(fleet: FleetMachines) -> int:
    """The exit status of a change of an instance, which has another name each time."""
    words = ("imdsproxy", "instance", "set", "web", "--name", f"web-{next(_NUMBERS)}")
    return fleet.machines["hub1"].attempt(*words)[0]


def _named(_: Guest, reply: Reply) -> str | None:
    right = reply.status == 200 and '"hostname": "www"' in reply.text
    return None if right else f"{reply.status} {reply.body[:80]!r}"


@contextmanager
def _nothing_lost(fleet: FleetMachines) -> Iterator[None]:
    """The guest reads all the time, and gets every answer."""
    with Load([fleet.guest("host2")], _META_DATA, _named, keep_alive=False, pause_s=0.05) as load:
        load.wait_answers(5)
        yield
        load.wait_answers(5)
    assert load.report.lost == []


# What is away


def _without_a_hub(fleet: FleetMachines) -> None:
    with _nothing_lost(fleet):
        fleet.machines["hub2"].run("systemctl", "stop", _HUB)
        until(lambda: _hosts(fleet).count("connected") == len(HOSTS), within_s=30)
        assert _change(fleet) == 0
        assert "hub2 absent" in _status(fleet)
        fleet.machines["hub2"].run("systemctl", "start", _HUB)


def _without_hubs(fleet: FleetMachines) -> None:
    host = fleet.machines["host2"]
    for name in HUBS:
        fleet.machines[name].run("systemctl", "stop", _HUB)
    assert _change(fleet) == _UNAVAILABLE
    # A reboot: nothing runs any more, and what was in memory is gone.
    host.run("systemctl", "stop", *_UNITS)
    host.run("rm", "--recursive", "--force", "/run/imdsproxy")
    host.run("systemd-tmpfiles", "--create", "imdsproxy.conf")
    host.run("systemctl", "start", _UNITS[0])
    until(
        lambda: fleet.guest("host2").is_served(_META_DATA, _named),
        within_s=30,
        what="the guest's document after a reboot",
    )
    assert fleet.guest("host2", "other").ask(_META_DATA).is_to_come_again
    for name in HUBS:
        fleet.machines[name].run("systemctl", "start", _HUB)
    until(lambda: _hosts(fleet).count("connected") == len(HOSTS), within_s=60)


def _without_a_member(fleet: FleetMachines) -> None:
    with _nothing_lost(fleet):
        fleet.machines["etcd3"].run("systemctl", "stop", "etcd")
        assert _change(fleet) == 0
        assert re.search("etcd3[^ ]* does not answer", _status(fleet))
        fleet.machines["etcd3"].run("systemctl", "start", "etcd")


def _without_a_way(fleet: FleetMachines) -> None:
    with _nothing_lost(fleet):
        with fleet.cut_off("host2"):
            until(lambda: re.search("absent +host2", _status(fleet)), within_s=30)
            assert _change(fleet) == NOT_IN_FORCE
        until(lambda: _hosts(fleet).count("connected") == len(HOSTS), within_s=60)


_AWAY: Final[Mapping[str, Callable[[FleetMachines], None]]] = {
    "a hub": _without_a_hub,
    "all hubs, or etcd": _without_hubs,
    "one member of etcd": _without_a_member,
    "a host's way to the hubs": _without_a_way,
}


def _take_away(fleet: FleetMachines) -> None:
    fleet.follow("## When something is away", 0)
    until(lambda: _hosts(fleet).count("connected") == len(HOSTS), within_s=30, what="both connect")
    for cause in _AWAY.values():
        cause(fleet)


def _check_removed(fleet: FleetMachines) -> None:
    assert re.search("host1 .* revoked", _hosts(fleet))
    host = fleet.machines["host1"]
    until(lambda: "revoked" in host.run("imdsproxy", "status"), what="the host says why")


# Restores


def _restore(fleet: FleetMachines) -> None:
    fleet.follow("## Back up and restore", 0)
    _restore_backup(fleet)
    # The page says that it may be omitted.
    fleet.words[" --bump-revision 1000000000 --mark-compacted"] = ""
    _restore_backup(fleet)


def _restore_backup(fleet: FleetMachines) -> None:
    words = ("-n", "blue", "--mac", "52:54:00:12:34:57", "--address", "10.0.0.6")
    hub = fleet.machines["hub1"]
    hub.run("imdsproxy", "instance", "add", "late", "--host", "host2", *words)
    with _nothing_lost(fleet):
        fleet.follow("## Back up and restore", 1)
        assert _change(fleet) == _UNAVAILABLE
        fleet.follow("## Back up and restore", 2)
        until(lambda: "suspect" in _status(fleet), within_s=60, what="the restore is noticed")
        fleet.follow("## Back up and restore", 3)
        assert _change(fleet) == _UNAVAILABLE
        # What the backup lacks is served on.
        assert "late" in fleet.machines["host2"].run("imdsproxy", "instance", "list")
        fleet.follow("## Back up and restore", 4)
    assert "late" not in fleet.machines["host2"].run("imdsproxy", "instance", "list")
    assert _change(fleet) == 0
