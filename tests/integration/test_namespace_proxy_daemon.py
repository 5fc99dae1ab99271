"""A network's own proxy in front of imdsproxy's unix listener."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.daemon import Daemon, instance, user_data_of
from support.guest import IPV6, Guest
from support.lab import Lab, record, until
from support.namespace_proxy import NETWORK, OTHER, PROGRAM, Place, open_place

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    """A daemon that listens in no namespace, only at the socket, and knows two networks."""
    lab = Lab()
    agents = {
        "enabled": True,
        "path": "{directory}/agents/metadata_proxy",
        "proxy_user": "nobody",
        "proxy_group": "nogroup",
    }
    daemon = Daemon(lab, {"unix_listener": agents, "resolver": {"hold_s": 0.2}})
    try:
        daemon.start()
        networks = [record(one, {"namespace": f"imdst-none-{one[:4]}"}) for one in (NETWORK, OTHER)]
        daemon.put(networks, [instance("mine", NETWORK), instance("others", OTHER)])
        yield daemon
    finally:
        daemon.close()
        lab.close()


@pytest.fixture
def place(daemon: Daemon) -> Iterator[Place]:
    """A network's namespace with a proxy that has the daemon behind it."""
    with open_place() as place:
        socket = daemon.directory / "agents" / "metadata_proxy"
        until(socket.exists, what="the daemon's socket")
        place.start(
            *(f"--metadata_proxy_socket={socket}", "--metadata_proxy_user=nobody"),
            "--metadata_proxy_group=nogroup",
        )
        yield place


@pytest.mark.parametrize("to", ["169.254.169.254", IPV6])
def test_a_guest_gets_its_own_documents_whatever_it_says_of_itself(place: Place, to: str) -> None:
    headers = [f"X-Neutron-Network-ID: {OTHER}", "X-Forwarded-For: 10.0.0.6", "X_Forwarded_For: a"]
    source = "2001:db8::5" if to == IPV6 else None
    found = place.guest.ask("/latest/user-data", to=to, source=source, headers=headers)
    assert (found.status, found.body) == (200, user_data_of("mine"))


def test_an_unknown_address_gets_the_404_of_the_daemon(place: Place) -> None:
    stranger: Guest = place.lab.guest("blue", 77)
    assert stranger.ask("/latest/user-data").status == 404


def test_a_second_network_with_the_same_addresses_is_another_one(
    place: Place, daemon: Daemon
) -> None:
    place.lab.namespace_network("red")
    guest = place.lab.guest("red")
    socket = daemon.directory / "agents" / "metadata_proxy"
    words = [*place.words(uuid=OTHER), f"--metadata_proxy_socket={socket}"]
    started = place.run(*words, namespace=place.lab.name("red"), program=[PROGRAM])
    assert (started.status, started.errors) == (0, "")
    assert guest.ask("/latest/user-data").body == user_data_of("others")
    assert place.guest.ask("/latest/user-data").body == user_data_of("mine")
