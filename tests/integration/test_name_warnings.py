"""Names that documents change or lack: the operator reads it with the write, and in `status` as long as it is so."""

from __future__ import annotations

import json
from typing import Final

import pytest

from support.daemon import instance
from support.world import World

pytestmark = pytest.mark.root

_KEY: Final = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJyr4lmyTyrn4wLF+VDqFVHTUVXYqAVFbCDyXCLLqLF5"
_ODD: Final = {
    "ssh_keys": [{"name": "my key", "key": _KEY}],
    "tags": {"with blank": "b", "größe": "c", "plain": "d"},
}


def test_a_write_and_status_say_which_names_guests_do_not_see(world: World) -> None:
    socket = ("--socket", str(world.daemon.runtime / "admin.sock"))
    record = json.dumps({"instances": [instance("red-5", "red", fields=_ODD)]})
    done = world.daemon.command("instance", "set", "--file", "-", *socket, stdin=record)
    assert done.status == 0, done.err
    shown = world.daemon.command("status", *socket).out
    for text in (done.out, shown):
        words = " ".join(text.split())
        assert 'red-5.ssh_keys["my key"]: guests see this key as "my-key"' in words
        assert 'red-5.tags["with blank"]: EC2' in words
        assert 'red-5.tags["größe"]: EC2' in words
        assert "plain" not in words
    assert world.red.ask("/latest/meta-data/public-keys").text == "0=my-key"

    (logged,) = [one for one in world.daemon.log_entries() if "my key" in str(one.get("warnings"))]
    assert (logged["level"], logged["instance"]) == ("warning", "red-5")

    world.daemon.put([], [instance("red-5", "red")])
    assert world.daemon.status()["warnings"] == []
