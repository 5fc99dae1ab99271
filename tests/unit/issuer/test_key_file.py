"""The operator's own keys: which files are taken, and when a key of the file signs."""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from hypothesis import given
from hypothesis import strategies as st

from imdsproxy.errors import SecretUnreadable
from imdsproxy.host.clock import Clock
from imdsproxy.issuer.key_file import GivenKey, parse_key_file, read_key_file
from imdsproxy.issuer.key_store import KeyStore
from imdsproxy.issuer.keys import make_key
from imdsproxy.issuer.ring import KeyRing, KeyState
from imdsproxy.issuer.rotation import Pace, plan_rotation

_ISSUER: Final = "https://id.example"
_PACE: Final = Pace(3600, 600)
_P256: Final = ec.generate_private_key(ec.SECP256R1())
_RSA: Final = rsa.generate_private_key(public_exponent=65537, key_size=2048)
_SHORT: Final = rsa.generate_private_key(public_exponent=65537, key_size=1024)  # noqa: S505 - to be refused
_WITH_CERTIFICATE: Final = make_key("ES256", _ISSUER, datetime.now(UTC))


def _pem(
    private: PrivateKeyTypes,
    form: PrivateFormat = PrivateFormat.PKCS8,
    password: bytes | None = None,
) -> bytes:
    encryption = BestAvailableEncryption(password) if password else NoEncryption()
    return private.private_bytes(Encoding.PEM, form, encryption)


def test_keys_keep_their_order_in_each_form_and_with_their_certificates() -> None:
    own = _WITH_CERTIFICATE
    text = _pem(_RSA, PrivateFormat.TraditionalOpenSSL) + b"a note\n" + own.render() + _pem(_P256)
    found = parse_key_file(text, "file")
    assert [one.id for one in found] == [GivenKey(_RSA).id, own.id, GivenKey(_P256).id]
    assert [one.certificate for one in found] == [None, own.certificate, None]
    assert len(parse_key_file(_pem(_RSA) + _pem(_RSA), "file")) == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no private key in PEM"),
        (b"-----BEGIN PUBLIC KEY-----\nAA==\n-----END PUBLIC KEY-----\n", "no private key in PEM"),
        (_pem(_RSA, password=b"secret"), "encrypted with a password"),
        (_pem(_SHORT), "RS256 nor ES256"),
        (_pem(ec.generate_private_key(ec.SECP384R1())), "RS256 nor ES256"),
        (_pem(ec.generate_private_key(ec.SECP256K1())), "RS256 nor ES256"),
        (_pem(ed25519.Ed25519PrivateKey.generate()), "RS256 nor ES256"),
        (_pem(_RSA).replace(b"MII", b"MIA"), "cannot be read"),
        (_pem(_RSA) + b"-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----", "remove it"),
    ],
)
def test_a_file_without_a_usable_key_is_refused_with_advice_and_never_quoted(
    content: bytes, reason: str
) -> None:
    with pytest.raises(SecretUnreadable) as caught:
        parse_key_file(content, "the-file")
    assert reason in str(caught.value)
    assert "the-file" in caught.value.message
    assert caught.value.hint
    assert caught.value.exit_status == 78
    quoted = {line for line in content.decode().splitlines() if len(line) > 20 and "-" not in line}
    assert not any(line in str(caught.value) for line in quoted)


@pytest.mark.parametrize("mode", [0o640, 0o620, 0o604, 0o660, 0o601])
def test_a_file_that_other_accounts_can_use_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key.pem"
    path.write_bytes(_pem(_P256))
    path.chmod(mode)
    with pytest.raises(SecretUnreadable, match=f"has mode {mode:04o}"):
        read_key_file(path, None)
    path.chmod(0o400)
    assert parse_key_file(read_key_file(path, None), str(path))


@pytest.mark.root
def test_a_file_belongs_to_root_or_to_the_signer_and_to_no_other_account(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    path.write_bytes(_pem(_P256))
    path.chmod(0o600)
    os.chown(path, 2, 2)
    assert read_key_file(path, 2)
    with pytest.raises(SecretUnreadable, match="belongs to user 2"):
        read_key_file(path, 3)


def _open(directory: Path, *keys: GivenKey) -> KeyStore:
    directory.mkdir(exist_ok=True)
    store = KeyStore(directory, "ES256", _ISSUER, Clock(), keys)
    store.open()
    return store


def _states(store: KeyStore) -> dict[str, str]:
    return {one.id: one.state.value for one in store.ring.entries}


def test_a_key_that_the_signer_made_goes_on_until_the_operator_s_is_known(tmp_path: Path) -> None:
    made = _open(tmp_path).signing.id
    own = GivenKey(_RSA)
    store = _open(tmp_path, own)
    assert _states(store) == {made: "signing", own.id: "next"}
    store.keep(store.ring.promote(own.id, 0))
    store = _open(tmp_path, own)
    assert _states(store) == {own.id: "signing", made: "old"}
    store.keep(store.ring.drop([made]))
    assert {path.name for path in tmp_path.iterdir()} == {"ring.json", f"{own.id}.crt"}
    with pytest.raises(SecretUnreadable, match="is missing") as caught:
        _open(tmp_path)
    assert "identity.key_file" in caught.value.hint


def test_each_start_has_the_same_certificate(tmp_path: Path) -> None:
    first = _open(tmp_path, GivenKey(_P256)).signing.jwk()
    assert _open(tmp_path, GivenKey(_P256)).signing.jwk() == first
    other = KeyStore(tmp_path / "other", "ES256", _ISSUER, Clock(), [GivenKey(_P256)])
    other.directory.mkdir()
    other.open()
    assert other.signing.jwk()["x5c"] != first["x5c"]


class _KilledError(Exception):
    """End of a signer at this place."""


def _die(*_: object, **__: object) -> None:
    raise _KilledError


def test_a_signer_that_was_killed_before_it_removed_a_stolen_key_removes_it_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = _open(tmp_path)
    stolen = store.signing.id
    added = store.add()
    ring = store.ring.promote(added, 0).drop([stolen])
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", _die)
        with pytest.raises(_KilledError):
            store.keep(ring)
    assert (tmp_path / f"{stolen}.pem").exists()
    (tmp_path / "operator.pem").write_text("a file of the operator")
    (tmp_path / f".{stolen}.pem.{2**22 + 1}-1.tmp").write_text("a part of a key")
    assert _open(tmp_path).signing.id == added
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"ring.json", "operator.pem", f"{added}.pem"}


def test_a_signer_that_was_killed_before_a_new_key_was_in_its_ring_forgets_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = _open(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(KeyStore, "keep", _die)
        with pytest.raises(_KilledError):
            store.add()
    assert len([*tmp_path.glob("*.pem")]) == 2
    kept = _open(tmp_path).signing.id
    assert {path.name for path in tmp_path.iterdir()} == {"ring.json", f"{kept}.pem"}


def test_a_signer_with_the_operator_s_key_makes_none(tmp_path: Path) -> None:
    store = _open(tmp_path, GivenKey(_P256))
    with pytest.raises(ValueError, match="the operator"):
        store.add()
    assert "BEGIN" not in json.dumps(store.signing.jwk())


def test_an_operator_who_turns_back_gets_the_first_key_again() -> None:
    ring = KeyRing().prefer("a", {"a"}, 0).prefer("b", {"a", "b"}, 100)
    assert ring.prefer("a", {"a", "b"}, 200).entries == KeyRing().prefer("a", {"a"}, 0).entries
    signing_b = ring.promote("b", 8000)
    # Verifiers know an old key.
    assert signing_b.prefer("a", {"a", "b"}, 8100).signing == "a"


def test_a_key_that_has_had_its_time_may_stay_in_the_file() -> None:
    ring = KeyRing().prefer("b", {"a", "b"}, 0)
    assert [one.id for one in ring.entries] == ["b"]
    assert ring.prefer("b", {"a", "b"}, 100) == ring


@given(st.lists(st.tuples(st.permutations("abc"), st.integers(0, 20_000)), max_size=10))
def test_while_no_key_is_taken_away_none_signs_before_verifiers_know_it(
    steps: list[tuple[list[str], int]],
) -> None:
    now, ring, published = 0, KeyRing(), dict[str, int]()
    for (key, *_), passed in steps:
        now += passed
        before = ring
        ring = plan_rotation(ring, _PACE, now).prefer(key, "abc", now)
        assert [one.state for one in ring.entries].count(KeyState.SIGNING) == 1
        ids = {one.id for one in ring.entries}
        published = {one: published.get(one, now) for one in ids}
        if before.entries and ring.signing != before.signing:
            assert now - published[ring.signing or ""] >= 2 * _PACE.cache_s


@given(st.sets(st.sampled_from("abc"), min_size=1), st.sampled_from("abc"))
def test_a_key_that_is_taken_away_signs_no_more_and_is_published_no_more(
    held: set[str], key: str
) -> None:
    ring = KeyRing().add("a", 0).add("b", 0).promote("b", 0).add("c", 0)
    ring = ring.prefer(key, held | {key}, 100)
    assert {one.id for one in ring.entries} <= held | {key}
    assert ring.signing in held | {key}
