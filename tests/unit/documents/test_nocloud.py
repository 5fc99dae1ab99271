from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from imdsproxy.core.documents.nocloud import render_yaml
from imdsproxy.core.model import Dialect
from support.guest_records import GUEST, Guest, guest

FILES = ("meta-data", "user-data", "vendor-data", "network-config")


def test_the_four_files_are_listed() -> None:
    assert Guest().text("/nocloud/") == "\n".join(FILES)


def test_all_four_files_are_there_for_the_barest_guest() -> None:
    bare = guest(ports=(), ssh_keys=(), tags=(), user_data=None, availability_zone=None)
    asked = Guest(bare)
    assert [asked.status(f"/nocloud/{name}") for name in FILES] == [200] * 4
    assert [asked.read(f"/nocloud/{name}") for name in FILES[1:]] == [b""] * 3


def test_meta_data_says_who_the_guest_is() -> None:
    assert yaml.safe_load(Guest().read("/nocloud/meta-data")) == {
        "instance-id": GUEST.uuid,
        "local-hostname": "web.example.org",
        "availability-zone": "eu-north-1b",
        "instance-type": "m1.small",
        "public-keys": {"alice": "ssh-ed25519 AAAAC3 alice@example.org"},
        "tags": {"role": "web", "tier": "1"},
    }


def test_meta_data_begins_with_the_instance_id_and_ends_without_a_newline() -> None:
    text = Guest().text("/nocloud/meta-data")
    assert text.startswith(f'instance-id: "{GUEST.uuid}"\n')
    assert not text.endswith("\n")


def test_user_data_and_vendor_data_are_as_stored() -> None:
    asked = Guest(guest(user_data=b"\x1f\x8b\xff", vendor_data=b"#!/bin/sh\n\xff"))
    assert asked.read("/nocloud/user-data") == b"\x1f\x8b\xff"
    assert asked.read("/nocloud/vendor-data") == b"#!/bin/sh\n\xff"


@pytest.mark.parametrize("name", ["", *FILES])
def test_with_the_dialect_off_everything_is_404(name: str) -> None:
    asked = Guest(guest(dialects=frozenset({Dialect.EC2})))
    assert asked.status(f"/nocloud/{name}") == 404


@given(st.dictionaries(st.text(max_size=40), st.text(max_size=80), max_size=5))
def test_yaml_reads_back_every_text(tags: dict[str, str]) -> None:
    readable = {
        key.encode("utf-8", "surrogatepass").decode("utf-8", "replace"): value
        for key, value in tags.items()
    }
    assert yaml.safe_load(render_yaml({"tags": dict(readable)})) == {"tags": readable}


@pytest.mark.parametrize(
    "text",
    [
        "\x85",
        "\u2028",
        "\u2029",
        "\ufeff",
        "\x7f",
        "\x00",
        "\U0001f600",
        "yes",
        "1",
        "~",
        "a: b # c",
    ],
)
def test_yaml_reads_back_the_odd_ones(text: str) -> None:
    assert yaml.safe_load(render_yaml({"tags": {"k": text}})) == {"tags": {"k": text}}
