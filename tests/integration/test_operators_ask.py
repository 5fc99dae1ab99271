"""What operators ask about instances and do to them, with a probe and about a posted password, and are warned of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import pytest

from support.daemon import instance
from support.world import World

pytestmark = pytest.mark.root


def test_a_probe_shows_what_our_documents_and_rules_answer(world: World) -> None:
    asked = ("explain", "red-5", "--probe")
    assert "GET /latest/meta-data/: 200 OK" in world.daemon.command(*asked).out
    nothing = world.daemon.command(*asked, "--path", "/latest/meta-data/nothing")
    assert (nothing.status, "nothing: 404 Not Found" in nothing.out) == (1, True)
    world.daemon.command("instance", "set", "red-5", "--no-ec2", "--no-openstack")
    assert "GET /nocloud/meta-data: 200 OK" in world.daemon.command(*asked).out
    world.daemon.command("instance", "set", "red-5", "--ec2", "--openstack", "--tokens", "required")
    refused = world.daemon.command(*asked)
    assert (refused.status, "401 Unauthorized" in refused.out) == (1, True)
    world.daemon.command("instance", "set", "red-5", "--clear", "policy")


def test_a_posted_password_is_shown_and_cleared(world: World) -> None:
    daemon, guest, password = world.daemon, world.red, "/openstack/latest/password"
    for clear in (
        ("instance", "password", "red-5", "--clear"),
        ("instance", "set", "red-5", "--clear", "password"),
    ):
        assert guest.ask(password, method="POST", body=b"c2VjcmV0").status == 200
        assert daemon.command("instance", "password", "red-5").out == "c2VjcmV0"
        assert daemon.command(*clear).status == 0
        assert guest.ask(password).body == b""


def test_a_link_in_the_place_of_a_password_is_not_followed(world: World, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("of the host")
    link = world.daemon.state / "passwords" / "red-5"
    link.symlink_to(secret)
    try:
        shown = world.daemon.command("instance", "password", "red-5")
    finally:
        link.unlink()
    assert (shown.status, shown.out) == (71, "")


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
