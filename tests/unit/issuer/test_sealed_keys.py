"""Keys of a fleet's issuer in its signers: no other key opens them."""

import json
from pathlib import Path
from typing import Any, Final

import pytest

from imdsproxy.errors import SecretUnreadable
from imdsproxy.host.clock import Clock
from imdsproxy.issuer.ring import KeyRing
from imdsproxy.issuer.sealed_keys import SEAL_FILE, SealedKeys

_ISSUER: Final = "https://id.example"


def _signer(directory: Path) -> SealedKeys:
    directory.mkdir(exist_ok=True)
    keys = SealedKeys(directory, "ES256", _ISSUER, Clock())
    keys.open()
    return keys


def _load(keys: SealedKeys, *made: dict[str, Any]) -> None:
    ring = KeyRing()
    for number, one in enumerate(made):
        ring = ring.add(one["id"], number)
    sealed = {one["id"]: one["sealed"] for one in made}
    keys.manage({"load": {"ring": json.loads(ring.render()), "sealed": sealed}})


def test_a_signer_with_the_same_seal_signs_with_the_same_keys(tmp_path: Path) -> None:
    first = _signer(tmp_path / "a")
    made = [first.manage({"make": True}) for _ in range(2)]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / SEAL_FILE).write_bytes((tmp_path / "a" / SEAL_FILE).read_bytes())
    second = _signer(tmp_path / "b")
    _load(second, *made)
    assert second.signing.id == made[0]["id"]
    assert [second.keys[one["id"]].jwk() for one in made] == [one["jwk"] for one in made]


def test_a_signer_with_another_seal_opens_no_key_and_keeps_its_own(tmp_path: Path) -> None:
    first, other = _signer(tmp_path / "a"), _signer(tmp_path / "b")
    own, foreign = other.manage({"make": True}), first.manage({"make": True})
    _load(other, own)
    with pytest.raises(SecretUnreadable, match="another key"):
        _load(other, foreign)
    assert other.signing.id == own["id"]


def test_a_sealed_key_is_bound_to_its_id(tmp_path: Path) -> None:
    keys = _signer(tmp_path / "a")
    one, two = (keys.manage({"make": True}) for _ in range(2))
    with pytest.raises(SecretUnreadable):
        _load(keys, {**one, "sealed": two["sealed"]})


def test_without_keys_nothing_is_signed(tmp_path: Path) -> None:
    with pytest.raises(SecretUnreadable, match="no key yet"):
        _ = _signer(tmp_path / "a").signing


@pytest.mark.parametrize("content", [b"", b"x", b"QUJD"])
def test_a_damaged_seal_is_never_replaced(tmp_path: Path, content: bytes) -> None:
    (tmp_path / SEAL_FILE).write_bytes(content)
    with pytest.raises(SecretUnreadable):
        SealedKeys(tmp_path, "ES256", _ISSUER, Clock()).open()
    assert (tmp_path / SEAL_FILE).read_bytes() == content


def test_the_seal_is_readable_by_its_owner_alone(tmp_path: Path) -> None:
    _signer(tmp_path / "a")
    assert (tmp_path / "a" / SEAL_FILE).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "request_", [{}, {"make": False}, {"load": {}}, {"load": {"ring": {}, "sealed": {}}}]
)
def test_another_request_is_refused(tmp_path: Path, request_: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r".+"):
        _signer(tmp_path / "a").manage(request_)
