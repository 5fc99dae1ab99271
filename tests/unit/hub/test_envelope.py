"""Secrets as they are in etcd."""

import pytest

from imdsproxy.errors import SecretUnreadable, SourceCorrupt
from imdsproxy.fleet.codec import Unreadable
from imdsproxy.fleet.layout import Sealing
from imdsproxy.hub.store.envelope import Envelope, add_key, make_envelope, name_of, parse_envelope

_KEY = b"c2Vj" + b"A" * 39 + b"="
_PLACE, _SECRET = "/imds/1/key/1", b"the key of all tokens"


def test_what_is_sealed_opens_in_its_place_with_a_key_of_that_name_only() -> None:
    one, other = (parse_envelope(make_envelope(), "f") for _ in range(2))
    sealed = one.seal(_PLACE, _SECRET)
    assert one.open(_PLACE, sealed) == _SECRET
    assert _SECRET not in sealed
    assert one.seal(_PLACE, _SECRET) != sealed
    renamed = Envelope({"2": one.keys["1"]})
    changed = sealed[:-1] + bytes([sealed[-1] ^ 1])
    for envelope, place, data in (
        (one, "/imds/1/key/2", sealed),
        (other, _PLACE, sealed),
        (renamed, _PLACE, sealed),
        (one, _PLACE, changed),
        (one, _PLACE, sealed[:8]),
        (one, _PLACE, b""),
        (one, _PLACE, b"\xff\0" + sealed),
    ):
        with pytest.raises(SourceCorrupt) as raised:
            envelope.open(place, data)
        assert _SECRET.decode() not in str(raised.value)


def test_the_first_key_seals_and_the_others_still_open() -> None:
    before = make_envelope("old")
    sealed = parse_envelope(before, "f").seal(_PLACE, _SECRET)
    both = parse_envelope(make_envelope("new") + before, "f")
    assert both.open(_PLACE, sealed) == _SECRET
    assert both.seal(_PLACE, _SECRET).startswith(b"new\0")


@pytest.mark.parametrize(
    "text",
    [b"", b"secret", b"1 c2VjcmV0", b"1  " + _KEY, b"1 " + _KEY + b"\n1 " + _KEY, b"\xff\n"],
    # Keys are others in each process that collects tests.
    ids=["nothing", "a word", "a short key", "two blanks", "a name twice", "no text"],
)
def test_a_file_that_holds_no_keys_is_refused_and_not_repeated(text: bytes) -> None:
    with pytest.raises(SecretUnreadable) as raised:
        parse_envelope(text, "envelope.key")
    assert "c2Vj" not in str(raised.value)
    assert raised.value.__cause__ is None


def test_keys_are_in_no_text_of_an_envelope() -> None:
    assert repr(parse_envelope(make_envelope("a"), "f")) == "Envelope(a)"


def test_a_key_that_is_added_seals_once_it_is_chosen_and_has_a_name_that_none_had() -> None:
    chosen: Sealing | None = None
    text, name = add_key(make_envelope("7"), "f")
    assert name == "8"
    both = Envelope(parse_envelope(text, "f").keys, lambda: chosen)
    assert name_of(both.seal(_PLACE, _SECRET)) == "7"
    chosen = Sealing("8", str(both.fingerprint("8")))
    sealed = both.seal(_PLACE, _SECRET)
    assert (name_of(sealed), both.open(_PLACE, sealed), both.missing()) == ("8", _SECRET, None)


@pytest.mark.parametrize("name", ["8", "9"])
def test_a_hub_without_the_key_that_seals_or_with_another_of_its_name_seals_nothing(
    name: str,
) -> None:
    other = parse_envelope(make_envelope(name), "f").fingerprint(name)
    own = parse_envelope(make_envelope("8"), "f").keys
    envelope = Envelope(own, lambda: Sealing(name, str(other)))
    assert f"the key {name}, which this hub does not have" in str(envelope.missing())
    with pytest.raises(SourceCorrupt, match=f"the key {name}, which this hub does not have"):
        envelope.seal(_PLACE, _SECRET)


def test_a_choice_that_cannot_be_read_is_no_missing_key_and_nothing_is_sealed_until_it_is_mended() -> (
    None
):
    def chosen() -> Sealing:
        raise Unreadable("the value is no JSON")

    envelope = Envelope(parse_envelope(make_envelope(), "f").keys, chosen)
    assert (envelope.missing(), envelope.sealing) == (None, None)
    with pytest.raises(SourceCorrupt, match="not readable") as caught:
        envelope.seal(_PLACE, _SECRET)
    assert "imdsproxy fleet reseal" in caught.value.hint
