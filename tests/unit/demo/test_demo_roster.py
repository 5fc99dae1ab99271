from __future__ import annotations

from demo.roster import guests


def test_each_network_has_the_same_addresses_and_macs() -> None:
    seen = [
        [(guest.ipv4, guest.ipv6, guest.mac) for guest in guests("w") if guest.network == id_]
        for id_ in ("red", "green", "blue")
    ]

    assert len(seen[0]) == 2
    assert seen[0] == seen[1] == seen[2]


def test_nothing_else_is_shared_by_two_guests() -> None:
    everyone = guests("w")

    for attribute in ("name", "netns", "uuid", "instance_id", "hostname", "ssh_keys", "user_data"):
        assert len({getattr(guest, attribute) for guest in everyone}) == len(everyone)
