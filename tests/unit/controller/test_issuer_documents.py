"""Tests of the issuer's documents: which certificate HAProxy gets, and when HAProxy loads again."""

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from imdsproxy.config.schema import Settings
from imdsproxy.controller.issuer_documents import IssuerDocuments, find_key_ids
from imdsproxy.issuer.documents import DOCUMENTS, KEYS_PATH
from support.certificates import make_authority

_TEXTS = {path: (kind, f"text of {path}") for path, kind in DOCUMENTS.items()}


class _Rig:
    def __init__(self, directory: Path) -> None:
        self.changes = 0
        own = make_authority(directory, "ca").issue("issuer", names=["IP:127.0.0.1"])
        self.certificate = own.bundle
        self.settings = self.with_certificate(self.certificate)
        self.documents = IssuerDocuments(
            "https://id.example/below", directory / "public", self._count
        )

    def with_certificate(self, file: Path) -> Settings:
        section = {"issuer": "https://id.example/below", "listen": "127.0.0.1:8443"}
        return Settings.model_validate({"identity": {**section, "certificate": str(file)}})

    def _count(self) -> None:
        self.changes += 1


@pytest.fixture
def rig(tmp_path: Path) -> _Rig:
    made = _Rig(tmp_path)
    made.documents.publish(_TEXTS)
    made.changes = 0
    return made


def test_the_frontend_serves_each_document_below_the_issuer_s_path(rig: _Rig) -> None:
    frontend = rig.documents.frontend(rig.settings)
    assert frontend is not None
    served = {path: Path(file).read_text() for path, _, file in frontend.documents}
    assert served == {f"/below{path}": text for path, (_, text) in _TEXTS.items()}


def test_nothing_is_served_before_the_signer_has_answered(tmp_path: Path) -> None:
    rig = _Rig(tmp_path)
    assert rig.documents.frontend(rig.settings) is None
    assert rig.documents.problem is None


def test_documents_of_the_last_run_are_served_again(rig: _Rig) -> None:
    later = IssuerDocuments(rig.documents.issuer, rig.documents.directory, lambda: None)
    later.load()
    assert later.frontend(rig.settings) == rig.documents.frontend(rig.settings)


def test_a_changed_certificate_has_haproxy_load_again_once(rig: _Rig) -> None:
    before = rig.documents.frontend(rig.settings)
    rig.documents.follow_certificate()
    assert rig.changes == 0
    rig.certificate.write_bytes(rig.certificate.read_bytes() + b"\n")
    rig.documents.follow_certificate()
    assert rig.changes == 1
    after = rig.documents.frontend(rig.settings)
    assert before is not None
    assert after is not None
    assert before.contents != after.contents
    rig.documents.follow_certificate()
    assert rig.changes == 1


def test_a_certificate_that_haproxy_would_refuse_is_a_problem_until_it_is_right(rig: _Rig) -> None:
    good = rig.certificate.read_bytes()
    for bad in (b"", good[:300], _encrypt(good)):
        rig.certificate.write_bytes(bad)
        assert rig.documents.frontend(rig.settings) is None
        assert rig.documents.problem is not None
        assert rig.documents.problem.field == "identity.certificate"
    rig.certificate.unlink()
    assert rig.documents.frontend(rig.settings) is None
    rig.certificate.write_bytes(good)
    rig.documents.follow_certificate()
    assert rig.changes == 1
    assert rig.documents.frontend(rig.settings) is not None
    assert rig.documents.problem is None


def _encrypt(bundle: bytes) -> bytes:
    """Return a certificate with its key under a password."""
    key = load_pem_private_key(bundle[bundle.index(b"-----BEGIN PRIVATE") :], None)
    form = Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")
    return bundle[: bundle.index(b"-----BEGIN PRIVATE")] + key.private_bytes(*form)


def test_key_ids_of_damaged_documents_are_none() -> None:
    keys = '{"keys": [{"kid": "b"}, {"kid": "a"}]}'
    assert find_key_ids({KEYS_PATH: ("application/json", keys)}) == ["b", "a"]
    for text in ("", "[]", '{"keys": [1]}', '{"keys": null}'):
        assert find_key_ids({KEYS_PATH: ("application/json", text)}) == []
    assert find_key_ids({}) == []
