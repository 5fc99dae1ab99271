from __future__ import annotations

import base64
import gzip

import yaml

from demo.lab import plan_links, plan_namespaces
from demo.roster import PREFIX, PROOF, guests, networks, records
from imdsproxy.core.records import parse_records


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


def test_the_word_of_a_run_is_in_every_user_data() -> None:
    for old, new in zip(guests("old"), guests("new"), strict=True):
        assert old.user_data_sha256 != new.user_data_sha256
        text = new.user_data
        if text.startswith(b"\x1f\x8b"):
            text = gzip.decompress(text)
        assert new.written.encode() in text
        assert PROOF.encode() in text


def test_the_ssh_keys_have_the_wire_form_of_ed25519() -> None:
    for guest in guests("w"):
        kind, text, _comment = guest.ssh_keys[0].split(" ")
        assert base64.b64decode(text)[:19] == b"\x00\x00\x00\x0bssh-ed25519\x00\x00\x00\x20"
        assert kind == "ssh-ed25519"


def test_all_three_kinds_of_listener_are_shown() -> None:
    assert {next(iter(network.listener)) for network in networks()} == {
        "namespace",
        "bridge",
        "interface",
    }


def test_the_records_survive_yaml_with_their_bytes() -> None:
    written = yaml.safe_load(yaml.safe_dump(records("w")))

    stored = {entry["id"]: entry["user_data"] for entry in written["instances"]}
    assert stored == {guest.uuid: guest.user_data for guest in guests("w")}


def test_the_records_are_acceptable_and_give_the_expected_ids() -> None:
    parsed = parse_records(yaml.safe_load(yaml.safe_dump(records("w"))))

    assert parsed.all_problems == ()
    instances = [instance for _where, instance in parsed.instances]
    assert [instance.uuid for instance in instances] == [guest.uuid for guest in guests("w")]
    assert [instance.ec2_id for instance in instances] == [
        guest.instance_id for guest in guests("w")
    ]


def test_every_link_is_made_in_a_namespace_of_the_lab() -> None:
    everyone = guests("w")
    names = plan_namespaces(networks(), everyone)

    assert len(names) == len(set(names))
    assert all(name.startswith(PREFIX) for name in names)
    assert {namespace for namespace, _lines in plan_links(networks(), everyone)} <= set(names)
    for _namespace, lines in plan_links(networks(), everyone):
        for line in lines:
            if " netns " in line:
                assert line.rpartition(" netns ")[2] in names
