from pathlib import Path

import pytest

from imdsproxy.api.client import AdminClient
from imdsproxy.config.load import Loaded, load_settings
from imdsproxy.errors import ConfigInvalid, HostRefused
from imdsproxy.tools.takeover.actor import Actor
from imdsproxy.tools.takeover.observe import recall, remember
from imdsproxy.tools.takeover.seen import Commands, Reach, Seen
from imdsproxy.tools.takeover.steps import Restart, WriteSettings


def _actor(directory: Path) -> Actor:
    def load() -> Loaded:
        return load_settings(directory / "imdsproxy.yaml", {})

    (directory / "imdsproxy.yaml").write_text("{}\n")
    return Actor(AdminClient(directory / "no.sock"), load, 5.0)


@pytest.mark.parametrize("before", [None, "sources: {}\n"])
def test_settings_that_are_not_acceptable_are_taken_back(
    tmp_path: Path, before: str | None
) -> None:
    actor, file = _actor(tmp_path), tmp_path / "conf.d" / "ovn.yaml"
    file.parent.mkdir()
    if before is not None:
        file.write_text(before)
    with pytest.raises(ConfigInvalid):
        WriteSettings("", "", "", str(file), "sources: {ovn: {southbound: nonsense}}\n").run(actor)
    assert (file.read_text() if file.exists() else None) == before
    WriteSettings("", "", "", str(file), "sources: {ovn: {enabled: true}}\n").run(actor)
    assert actor.load().settings.sources.ovn.enabled


def test_a_command_that_fails_is_an_error_with_what_it_printed(tmp_path: Path) -> None:
    with pytest.raises(HostRefused, match="ended with 3: no such unit"):
        Restart("", "echo no such unit; exit 3", "").run(_actor(tmp_path))


def test_how_an_agent_is_started_is_known_until_it_has_been_given_its_place_back(
    tmp_path: Path,
) -> None:
    remember(tmp_path, "ovn", Seen(commands=Commands("docker stop x", "docker start x")))
    remember(tmp_path, "l3", Seen(commands=Commands("a", "b"), files=("l3_agent.ini",)))
    inside = Seen(
        files=("/proc/7/root/etc/dhcp_agent.ini",),
        reach=Reach("/proc/7/root", 42435),
        haproxy=("/usr/sbin/haproxy", "/proc/7/root/usr/local/sbin/haproxy"),
    )
    remember(tmp_path, "dhcp", inside)
    known = {
        "stop": "docker stop x",
        "start": "docker start x",
        "files": [],
        "owner": [0, 0],
        "stand_in": "",
    }
    assert recall(tmp_path)["ovn"] == known
    assert recall(tmp_path)["l3"]["files"] == ["l3_agent.ini"]
    assert recall(tmp_path)["dhcp"]["files"] == []
    assert recall(tmp_path)["dhcp"]["stand_in"] == ""
    remember(tmp_path, "dhcp", None)
    remember(tmp_path, "ovn", None)
    assert recall(tmp_path).keys() == {"l3"}
    remember(tmp_path, "l3", None)
    assert list(tmp_path.iterdir()) == []
