"""A guest that claims its neighbour's address, or sends in its name: the neighbour is served as before."""

import itertools
import secrets
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any, Final

import pytest

from support.daemon import instance, user_data_of
from support.guest import IPV4, IPV6, Background, Guest, Lost, Reply
from support.impostor import (
    ACK,
    FIN,
    RST,
    SYN,
    claim_frame,
    mac_of_service,
    open_wire,
    tcp_frame,
)
from support.lab import until
from support.world import World, own

pytestmark = pytest.mark.root

_TARGET: Final = "/latest/user-data"
_KINDS: Final = pytest.mark.parametrize("network", ["red", "blue", "grey"])
_FAMILIES: Final = pytest.mark.parametrize("to", [IPV4, IPV6])
_TRIES: Final = 30


class _Claims(Background):
    """A guest says again and again, to the listener only, that a neighbour's address is at its MAC."""

    def __init__(self, thief: Guest, address: str, to: str) -> None:
        super().__init__(self._claim)
        thief.ask(_TARGET, to=to)
        self._frame = claim_frame(thief.mac, address, mac_of_service(thief, to))
        self._wire = open_wire(thief.namespace, thief.device, timeout_s=1)

    def _claim(self) -> None:
        with closing(self._wire):
            while not self._stop.wait(0.02):
                self._wire.send(self._frame)


def _address(guest: Guest, to: str) -> str:
    return guest.addresses[0] if to == IPV4 else guest.link_local


def _by_mac(guest: Guest, name: str) -> dict[str, object]:
    """A record that has nothing but the guest's MAC."""
    return {
        **instance(name, guest.network),
        "ports": [{"network": guest.network, "mac": guest.mac}],
    }


def _wrong(guest: Guest, to: str, name: str) -> list[str]:
    """What is wrong with many answers, each over a connection of its own."""
    found = []
    for _ in range(_TRIES):
        try:
            reply = guest.ask(_TARGET, to=to, timeout_s=2)
        except Lost as error:
            found.append(str(error))
            continue
        if (reply.status, reply.body) != (200, user_data_of(name)):
            found.append(str(reply))
    return found


def _macs(world: World) -> dict[str, Any]:
    found: dict[str, Any] = world.daemon.status()["macs"]
    return found


@contextmanager
def _claimed(world: World, thief: Guest, address: str, to: str) -> Iterator[None]:
    """While in it, the host believes that the address is at the thief's MAC."""
    with _Claims(thief, address, to):
        until(
            lambda: world.daemon.explain(thief.network, address)["pair"]["seen"] == thief.mac,
            what="the host's belief",
        )
        yield


@_KINDS
@_FAMILIES
def test_no_claim_to_its_address_keeps_a_guest_from_its_documents(
    world: World, network: str, to: str
) -> None:
    victim, thief = world.guests[network], world.lab.guest(network, 66)
    world.daemon.put(instances=[instance("thief", network, 66)])
    name, address = f"{network}-5", _address(victim, to)
    with victim.connect(to=to) as kept:
        assert own(victim, kept.request(_TARGET)) is None
        with _claimed(world, thief, address, to):
            assert _wrong(victim, to, name) == []
            assert own(victim, kept.request(_TARGET)) is None
            _is_reported(world, network, address, thief.mac)
    world.all_right()


def _is_reported(world: World, network: str, address: str, mac: str) -> None:
    """Operators learn of the claims, and who makes them."""
    before = _macs(world)["forged_claims"].get(network, 0)
    until(lambda: _macs(world)["forged_claims"].get(network, 0) > before, what="claims that grow")
    assert f"{address} in network {network} by {mac}" in _macs(world)["claimed"]
    why = world.daemon.explain(network, address)["why"]
    assert any(f"claimed by {mac}" in one for one in why), why


@_FAMILIES
def test_no_claim_cuts_a_guest_that_is_known_by_its_mac_alone(world: World, to: str) -> None:
    victim, thief = world.lab.guest("red", 108), world.lab.guest("red", 109)
    world.daemon.put(instances=[_by_mac(victim, "victim"), _by_mac(thief, "thief")])
    address = _address(victim, to)
    assert victim.ask(_TARGET, to=to).body == user_data_of("victim")
    with victim.connect(to=to) as kept, _claimed(world, thief, address, to):
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            assert kept.request(_TARGET).body == user_data_of("victim")
            assert _wrong(victim, to, "victim") == []


def _forged(thief: Guest, victim: Guest, port: int, to: str) -> list[bytes]:
    """Segments of a connection of the victim's, as one who does not see it can make them."""
    service = mac_of_service(thief, to)
    flags = (SYN, ACK, RST, RST | ACK, FIN | ACK, SYN | ACK, 0)
    return [
        tcp_frame(
            mac=thief.mac,
            to=service,
            source=_address(victim, to),
            ports=(port, target),
            flags=one,
            numbers=(secrets.randbits(32), secrets.randbits(32)),
        )
        for one, target in itertools.product(flags, (80, 254))
    ]


def _each_forgery(
    thief: Guest, victim: Guest, to: str
) -> Iterator[tuple[bytes, Reply | Lost | None]]:
    """For each forged segment what the victim is answered after it on the connection."""
    thief.ask(_TARGET, to=to)
    with open_wire(thief.namespace, thief.device, timeout_s=1) as wire:
        for number in range(len(_forged(thief, victim, 0, to))):
            with victim.connect(to=to, timeout_s=3) as kept:
                port = kept.socket.getsockname()[1]
                frame = _forged(thief, victim, port, to)[number]
                wire.send(frame)
                try:
                    reply = kept.request(_TARGET)
                    yield frame, reply
                    # An unknown guest's connection ends with its answer.
                    if not reply.closes:
                        wire.send(frame)
                        yield frame, kept.request(_TARGET)
                except Lost as error:
                    yield frame, error


@_KINDS
@_FAMILIES
def test_no_forged_segment_touches_a_neighbours_connection(
    world: World, network: str, to: str
) -> None:
    victim, thief = world.guests[network], world.lab.guest(network, 66)
    world.daemon.put(instances=[instance("thief", network, 66)])
    wrong = [
        (frame[-20:].hex(), reply)
        for frame, reply in _each_forgery(thief, victim, to)
        if isinstance(reply, Lost) or reply is None or own(victim, reply) is not None
    ]
    assert wrong == []


@_FAMILIES
def test_no_forged_segment_touches_a_connection_that_is_not_verified(world: World, to: str) -> None:
    victim, thief = world.lab.guest("red", 108), world.lab.guest("red", 66)
    world.daemon.put(instances=[instance("thief", "red", 66)])
    wrong = []
    forgeries = _each_forgery(thief, victim, to)
    for number, (frame, reply) in enumerate(forgeries):
        if isinstance(reply, Lost) or reply is None or reply.status != 404:
            wrong.append((number, frame[-20:].hex(), reply))
    assert wrong == []


@pytest.mark.parametrize("network", ["blue", "grey"])
@_FAMILIES
def test_a_guest_that_claims_the_metadata_address_gets_no_request_of_its_neighbours(
    world: World, network: str, to: str
) -> None:
    victim, thief = world.guests[network], world.lab.guest(network, 66)
    assert victim.ask(_TARGET, to=to).status == 200
    frame = claim_frame(thief.mac, to, bytes.fromhex(victim.mac.replace(":", "")))
    with open_wire(thief.namespace, thief.device, timeout_s=1) as wire:

        def is_believed() -> bool:
            wire.send(frame)
            return mac_of_service(victim, to).hex(":") == thief.mac

        until(is_believed, what="the victim's belief")
        for _ in range(5):
            assert is_believed()
            assert own(victim, victim.ask(_TARGET, to=to, timeout_s=2)) is None
