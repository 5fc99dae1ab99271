"""What the fleet's CA signs, and what it does not."""

import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID

from imdsproxy.errors import ConfigInvalid, RequestRefused
from imdsproxy.fleet.members import Role
from imdsproxy.host.certificates import (
    make_key,
    render_certificate,
    render_key,
    render_request,
    renewal_due,
)
from imdsproxy.hub.pki.authority import (
    HOST_LIFE,
    MAX_REQUEST,
    Authority,
    make_authority,
    parse_authority,
    parse_request,
)

_NOW = datetime(2026, 12, 1, 12, tzinfo=UTC)


@pytest.fixture(scope="module")
def authority() -> Authority:
    return make_authority("fleet", _NOW)


def _names(certificate: x509.Certificate) -> dict[str, str]:
    return {one.rfc4514_attribute_name: str(one.value) for one in certificate.subject}


def test_a_certificates_subject_is_role_name_and_project(authority: Authority) -> None:
    key = make_key().public_key()
    host = authority.certify_host(key, "host-1", _NOW)
    mover = authority.certify_operator(key, "anna", Role.MOVER, "p-1", _NOW)
    hub = authority.certify_hub(key, "hub-1", ("hub1.example.net", "192.0.2.1", "::1"), _NOW)
    assert _names(host) == {"OU": "host", "CN": "host-1"}
    assert _names(mover) == {"O": "p-1", "OU": "mover", "CN": "anna"}
    assert _names(hub) == {"OU": "hub", "CN": "hub-1"}
    for one in (host, mover, hub):
        one.verify_directly_issued_by(authority.certificate)


def test_a_hosts_certificate_is_good_for_thirty_days_and_renewed_after_two_thirds(
    authority: Authority,
) -> None:
    host = authority.certify_host(make_key().public_key(), "host-1", _NOW)
    assert host.not_valid_after_utc == _NOW + timedelta(days=30)
    assert host.not_valid_before_utc < _NOW
    assert not renewal_due(host, _NOW + timedelta(days=19))
    assert renewal_due(host, _NOW + timedelta(days=21))


def test_a_certificate_that_was_made_by_a_clock_that_is_set_right_since_is_to_be_renewed(
    authority: Authority,
) -> None:
    host = authority.certify_host(make_key().public_key(), "host-1", _NOW)
    assert not renewal_due(host, _NOW - timedelta(minutes=59))
    assert renewal_due(host, _NOW - timedelta(minutes=61))


def test_no_certificate_outlives_the_cas(authority: Authority) -> None:
    end = authority.certificate.not_valid_after_utc
    late = authority.certify_host(make_key().public_key(), "host-1", end - HOST_LIFE / 2)
    assert late.not_valid_after_utc == end


@pytest.mark.parametrize("name", ["", "a b", "a/b", "-a", "a\n", "a,CN=b", "ä", "a" * 65, "a\0"])
def test_a_name_that_is_none_is_not_certified(authority: Authority, name: str) -> None:
    key = make_key().public_key()
    with pytest.raises(RequestRefused):
        authority.certify_host(key, name, _NOW)
    with pytest.raises(RequestRefused):
        authority.certify_operator(key, "anna", Role.READER, name, _NOW)


@pytest.mark.parametrize(
    "address", ["", "a b", "hub:8469", "https://hub", "a..b", "*.example.net", "192.0.2.0/24"]
)
def test_a_hub_has_dns_names_and_addresses_only(authority: Authority, address: str) -> None:
    with pytest.raises(RequestRefused, match="neither an IP address nor a DNS name"):
        authority.certify_hub(make_key().public_key(), "hub-1", (address,), _NOW)


def test_a_request_gives_its_key_and_nothing_else() -> None:
    key = make_key()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "another-host")])
    names = x509.SubjectAlternativeName([x509.DNSName("hub1.example.net")])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject)
    request = request.add_extension(names, critical=False)
    pem = request.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()
    assert parse_request(pem) == key.public_key()
    assert parse_request(render_request(key).decode()) == key.public_key()


def _request(
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey,
) -> str:
    own = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return request.sign(key, own).public_bytes(serialization.Encoding.PEM).decode()


def test_a_request_that_is_none_or_has_another_kind_of_key_is_refused() -> None:
    good = render_request(make_key())
    one = x509.load_pem_x509_csr(good).public_bytes(serialization.Encoding.DER)
    # Its signature's last byte.
    forged = x509.load_der_x509_csr(one[:-1] + bytes([one[-1] ^ 1]))
    for pem in (
        "",
        "rubbish",
        good.decode()[:-60],
        good.decode() + "x" * MAX_REQUEST,
        forged.public_bytes(serialization.Encoding.PEM).decode(),
        _request(ec.generate_private_key(ec.SECP384R1())),
        _request(rsa.generate_private_key(65537, 2048)),
        _request(ed25519.Ed25519PrivateKey.generate()),
        render_key(make_key()).decode(),
        render_certificate(make_authority("other", _NOW).certificate).decode(),
    ):
        with pytest.raises(RequestRefused):
            parse_request(pem)


def test_a_given_ca_of_ecdsa_or_rsa_signs_what_openssl_verifies(tmp_path: Path) -> None:
    for kind in (("ec", "-pkeyopt", "ec_paramgen_curve:secp384r1"), ("rsa:2048",)):
        made = ("openssl", "req", "-x509", "-nodes", "-newkey", *kind, "-subj", "/CN=own", "-days", "90",
                "-addext", "keyUsage=critical,keyCertSign",
                "-keyout", str(tmp_path / "k"), "-out", str(tmp_path / "c"))  # fmt: skip
        subprocess.run(made, check=True, capture_output=True)
        given = parse_authority((tmp_path / "c").read_bytes(), (tmp_path / "k").read_bytes(), "c")
        signed = given.certify_host(make_key().public_key(), "host-1", datetime.now(UTC))
        (tmp_path / "h").write_bytes(render_certificate(signed))
        verify = (
            "openssl",
            "verify",
            "-x509_strict",
            "-CAfile",
            str(tmp_path / "c"),
            str(tmp_path / "h"),
        )
        done = subprocess.run(verify, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done


def _bare_ca(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    """A CA without key usage, which Python's ssl refuses."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bare")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name)
    return (
        builder.public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(_NOW)
        .not_valid_after(_NOW + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )


def _signed_ca(root: Authority) -> tuple[bytes, bytes]:
    """A CA that another one has signed, and its key."""
    key = make_key()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "below")])
    made = make_authority("below", _NOW).certificate
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(root.certificate.subject)
    for one in made.extensions:
        if not isinstance(one.value, x509.SubjectKeyIdentifier):
            builder = builder.add_extension(one.value, critical=one.critical)
    signed = (
        builder.public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(_NOW)
        .not_valid_after(_NOW + timedelta(days=1))
        .sign(root.key, hashes.SHA256())
    )
    return render_certificate(signed), render_key(key)


def test_a_ca_that_cannot_sign_is_refused_without_showing_the_key(authority: Authority) -> None:
    ca, key = render_certificate(authority.certificate), render_key(authority.key)
    leaf_key = make_key()
    leaf = render_certificate(authority.certify_host(leaf_key.public_key(), "host-1", _NOW))
    bare_key = make_key()
    bare = render_certificate(_bare_ca(bare_key))
    locked = authority.key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"word"),
    )
    for certificate, secret, why in (
        (b"", key, "holds no certificate"),
        (ca, b"", "cannot be read"),
        (ca, b"-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----", "cannot be read"),
        (ca, locked, "cannot be read"),
        (ca, render_key(make_key()), "does not belong"),
        (leaf, render_key(leaf_key), "may not sign"),
        (bare, render_key(bare_key), "may not sign"),
        (*_signed_ca(authority), "is signed by another CA"),
    ):
        with pytest.raises(ConfigInvalid, match=why) as raised:
            parse_authority(certificate, secret, "ca.crt")
        assert "c2VjcmV0" not in repr(raised.value)
        assert raised.value.__cause__ is None or why == "holds no certificate"
    assert "PRIVATE" not in repr(authority)
