from __future__ import annotations

from urllib.parse import quote

import pytest

from imdsproxy.core.documents.ec2 import list_warnings, warn_of_names
from imdsproxy.core.model import Dialect, SshKey, Upstream
from imdsproxy.errors import Problem, quoted
from support.guest_records import GUEST, Guest, guest

_KEY = "ssh-ed25519 AAAAC3"
_EC2 = "/latest/meta-data"
_TAGS = f"{_EC2}/tags/instance"


@pytest.mark.parametrize("name", ["a", "Name", "a+b-c.d,e_f:g@h", "0"])
def test_names_that_documents_have_as_they_are_are_not_warned_of(name: str) -> None:
    named = guest(tags=((name, "v"),), ssh_keys=(SshKey(name, _KEY),))
    assert warn_of_names(named) == ()
    assert Guest(named).lines(_TAGS) == [name]
    assert Guest(named).text(f"{_TAGS}/{name}") == "v"


@pytest.mark.parametrize(
    "name", ["a b", "a/b", "größe", "", ".", "..", "_index", "tail\n", "a+b=c.d"]
)
def test_a_tag_that_ec2_does_not_list_is_warned_of(name: str) -> None:
    tagged = guest(tags=((name, "v"), ("plain", "w")))
    (warning,) = warn_of_names(tagged)
    asked = Guest(tagged)
    assert asked.text(_TAGS) == "plain"
    # One with `=` is served and not listed.
    path = f"{_TAGS}/{quote(name, safe='')}"
    if name not in ("", ".", ".."):
        assert asked.status(path) == (200 if "=" in name else 404)
    assert warning.field == f"instances.{GUEST.id}.tags[{quoted(name)}]"
    assert "EC2" in warning.reason


def test_tags_are_not_warned_of_where_ec2_is_off() -> None:
    assert warn_of_names(guest(tags=(("a b", "v"),), dialects=frozenset({Dialect.NOCLOUD}))) == ()
    assert warn_of_names(guest(tags=(("a b", "v"),), upstream=Upstream.NOVA)) == ()


def test_a_key_that_guests_see_under_another_name_is_warned_of() -> None:
    keys = (SshKey("my key", _KEY), SshKey("my-key", _KEY), SshKey("other", _KEY))
    found = warn_of_names(guest(ssh_keys=keys))
    assert Guest(guest(ssh_keys=keys)).lines(f"{_EC2}/public-keys") == [
        "0=my-key",
        "1=my-key-2",
        "2=other",
    ]
    assert [(one.field, one.reason) for one in found] == [
        (f'instances.{GUEST.id}.ssh_keys["my key"]', 'guests see this key as "my-key"'),
        (f'instances.{GUEST.id}.ssh_keys["my-key"]', 'guests see this key as "my-key-2"'),
    ]


def test_of_many_warnings_the_first_are_listed_and_the_others_counted() -> None:
    lines = list_warnings(Problem(str(number), "no") for number in range(123))
    assert (lines[0], lines[19], lines[20:]) == ("0: no", "19: no", ("and 103 more",))
