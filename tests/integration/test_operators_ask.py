"""What operators ask about instances and do to them: by name, with a probe, and about a posted password."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.nova_world import NovaWorld, open_nova_world
from support.recorder import reply
from support.world import World

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def shared_nova() -> Iterator[NovaWorld]:
    with open_nova_world() as world:
        yield world


@pytest.fixture
def nova(shared_nova: NovaWorld) -> NovaWorld:
    shared_nova.forget()
    return shared_nova


@pytest.mark.parametrize("status", [200, 403, 404])
def test_a_probe_shows_what_nova_answers_the_guest(nova: NovaWorld, status: int) -> None:
    nova.nova.always(reply(b"x", status=status))
    asked = ("--network", "red", "--from", "10.0.0.5")
    guest = nova.red.ask("/latest/meta-data/")
    (sent,) = nova.requests()
    nova.nova.forget()
    nova.nova.always(reply(b"x", status=status))

    explained = nova.daemon.command("explain", *asked)
    assert nova.requests() == [], "nothing is asked without --probe"
    probed = nova.daemon.command("explain", *asked, "--probe")

    assert guest.status == status
    assert explained.status == 0
    assert "found, its requests are sent to Nova" in explained.out
    assert f"GET /latest/meta-data/: {status} " in probed.out
    assert probed.status == (0 if status == 200 else 1)
    (as_operator,) = nova.requests()
    identity = nova.identity("red").items()
    for one in (sent, as_operator):
        assert one.target == b"/latest/meta-data/"
        assert identity <= dict(one.headers).items() or all(
            one.values(name.decode()) == (value,) for name, value in identity
        )


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
