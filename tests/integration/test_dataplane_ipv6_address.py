"""The metadata addresses themselves: the kernel still asks whether somebody else has the IPv6 one, or somebody has."""

from __future__ import annotations

import pytest

from support.daemon import instance
from support.guest import IPV4, IPV6, Guest, Lost
from support.lab import RecordMapping, batch, ip, run, until, within
from support.world import World, own, reads_own

pytestmark = pytest.mark.root

_DEVICE = "br0"
_AGENTS_ADDRESS = f"address add {IPV6}/64 dev {_DEVICE}"


def _network(world: World, *, probes: int) -> tuple[RecordMapping, Guest]:
    """A network without its IPv6 address, and a guest; the kernel asks for its addresses that often."""
    lab = world.lab
    lab.furnish("late", addresses=False)
    guest = lab.guest("late", 5)
    name = lab.name("late")
    for key, value in (("accept_dad", 1), ("dad_transmits", probes)):
        place = f"/proc/sys/net/ipv6/conf/{_DEVICE}/{key}"
        run(*within(name), "sh", "-c", f"echo {value} >{place}")
    ip("-n", name, "address", "add", f"{IPV4}/32", "dev", _DEVICE)
    return {"id": "late", "listener": {"namespace": name}}, guest


def _code(world: World) -> str:
    return str(world.daemon.left_out().get("late", {}).get("code", ""))


@pytest.mark.slow
def test_while_the_kernel_asks_whether_the_ipv6_address_is_taken_ipv4_is_served_and_then_both(
    world: World,
) -> None:
    network, guest = _network(world, probes=3)
    batch(world.lab.name("late"), [_AGENTS_ADDRESS])
    world.daemon.put([network], [instance("late-5", "late")])

    assert _code(world) == "address-tentative"
    assert own(guest, guest.ask("/latest/user-data", to=IPV4)) is None
    until(lambda: reads_own(guest, IPV6), within_s=10, what="IPv6 as well")
    until(lambda: _code(world) == "", what="nothing left out")


def test_where_somebody_else_has_the_ipv6_address_ipv4_is_served_and_ipv6_once_it_is_free(
    world: World,
) -> None:
    network, guest = _network(world, probes=1)
    ip("-n", guest.namespace, "address", "add", f"{IPV6}/64", "dev", "eth0", "nodad")
    batch(world.lab.name("late"), [_AGENTS_ADDRESS])
    world.daemon.put([network], [instance("late-5", "late")])

    until(lambda: _code(world) == "address-duplicate", within_s=10, what="the duplicate")
    assert own(guest, guest.ask("/latest/user-data", to=IPV4)) is None
    ip("-n", guest.namespace, "address", "del", f"{IPV6}/64", "dev", "eth0")
    batch(world.lab.name("late"), [f"address del {IPV6}/64 dev {_DEVICE}", _AGENTS_ADDRESS])
    until(lambda: reads_own(guest, IPV6), within_s=10, what="IPv6 as well")


def test_nobody_answers_at_any_other_address_of_the_namespace(world: World) -> None:
    red = world.red
    for other in ("10.0.0.1", "2001:db8::1"):
        with pytest.raises(Lost):
            red.ask("/latest/user-data", to=other)
    assert own(red, red.ask("/latest/user-data", to=IPV4)) is None
