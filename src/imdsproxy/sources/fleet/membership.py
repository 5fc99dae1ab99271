"""This host's membership of a fleet: joining, the files of `fleet join`, and renewal of the host's certificate."""

import contextlib
import http.client
import json
import ssl
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from urllib.parse import urlsplit

from cryptography.x509 import Certificate

from imdsproxy.errors import (
    AccessDenied,
    AlreadyExists,
    ConfigInvalid,
    RequestRefused,
    SourceRefused,
    SourceUnavailable,
)
from imdsproxy.fleet.members import AUTHORITY_PATH, ENROL_PATH, RENEW_PATH, Invitation
from imdsproxy.fleet.stream import CONNECT_S
from imdsproxy.host.certificates import (
    PrivateKey,
    fingerprint,
    is_issued_by,
    make_key,
    parse_certificate,
    parse_certificates,
    render_certificate,
    render_key,
    render_request,
    renewal_due,
)
from imdsproxy.host.files import ensure_directory, read_secret, write_atomic
from imdsproxy.sources.fleet.client import HostFiles, HubClient

_TIMEOUT_S: Final = 15.0
_MAX_ANSWER: Final = 64 * 1024
_OK: Final = 200
_DENIED: Final = (401, 403)
_SECRET: Final = 0o600
_NOTHING_SENT: Final = (
    "the token was not sent; compare the URL, or make a new string with `imdsproxy fleet enrol`"
)


@dataclass(frozen=True, slots=True)
class _Issued:
    certificate: bytes
    authorities: bytes


def join(invitation: Invitation, files: HostFiles) -> str:
    """Join a fleet: exchange the token for a certificate at the first hub that proves its identity; return its URL.

    Only the CA certificate that the invitation names can prove it. The CA certificates to trust from then on come with
    the hub's answer.

    Raises:
        AccessDenied: The token is not valid.
        AlreadyExists: This host is a member of another fleet.
        ImdsproxyError: A file cannot be written, a hub refuses the request, or no hub answers.
        SourceRefused: No hub of the fleet answers, but another server does.
    """
    _refuse_another_fleet(invitation, files)
    key = make_key()
    refusals: list[SourceRefused] = []
    reasons: list[str] = []
    for url in invitation.urls:
        try:
            authority = _fetch_authority(url, invitation.fingerprint)
            issued = _enrol(url, authority, invitation, key)
        except SourceRefused as error:
            refusals.append(error)
            reasons.append(error.message)
            continue
        except SourceUnavailable as error:
            reasons.append(error.message)
            continue
        ensure_directory(files.certificate.parent, mode=0o700)
        write_atomic(files.authority, issued.authorities, mode=0o644, durable=True)
        hubs = "".join(f"{one}\n" for one in invitation.urls)
        write_atomic(files.hubs, hubs.encode(), mode=0o644, durable=True)
        _write_pair(files, key, issued.certificate)
        return url
    if refusals:
        raise SourceRefused("; ".join(reasons), hint=refusals[0].hint)
    raise SourceUnavailable("; ".join(reasons), hint="the token is not used up: try again")


def _refuse_another_fleet(invitation: Invitation, files: HostFiles) -> None:
    if not files.authority.exists():
        return
    known = parse_certificates(files.authority.read_bytes(), str(files.authority))
    if invitation.fingerprint not in map(fingerprint, known):
        raise AlreadyExists(
            f"this host is a member of another fleet: {files.authority}",
            hint=f"to leave it, remove {files.authority.parent} and the records that it had",
        )


def _fetch_authority(url: str, wanted: str) -> Certificate:
    """Fetch the CA certificate with this fingerprint from a server whose identity is not proved yet.

    While the fleet replaces its CA, a hub sends several certificates. An impostor may have added others.
    """
    anyone = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anyone.check_hostname = False
    anyone.verify_mode = ssl.CERT_NONE
    status, pem = _exchange(url, anyone, "GET", AUTHORITY_PATH, None)
    if status == _OK:
        with contextlib.suppress(ConfigInvalid):
            for found in parse_certificates(pem, url):
                if fingerprint(found) == wanted:
                    return found
    raise SourceRefused(
        f"{url} is not a hub of this fleet: it has no CA certificate with the fingerprint of the invitation",
        hint=_NOTHING_SENT,
    )


def _enrol(url: str, authority: Certificate, invitation: Invitation, key: PrivateKey) -> _Issued:
    """Send the token over a connection that this CA certificate alone verifies."""
    context = ssl.create_default_context(cadata=render_certificate(authority).decode())
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    request = render_request(key).decode()
    body = {"host": invitation.host, "token": invitation.token, "request": request}
    status, answer = _exchange(url, context, "POST", ENROL_PATH, json.dumps(body).encode())
    return _read_issued(url, status, answer, key, authority)


def _exchange(
    url: str, context: ssl.SSLContext, method: str, path: str, body: bytes | None
) -> tuple[int, bytes]:
    place = urlsplit(url)
    connection = http.client.HTTPSConnection(
        place.hostname or "", place.port, context=context, timeout=CONNECT_S
    )
    headers = {} if body is None else {"content-type": "application/json"}
    with _refusing(url), contextlib.closing(connection):
        connection.connect()
        # A busy hub gets more time for its answer. A machine that hangs does not even accept a connection.
        connection.sock.settimeout(_TIMEOUT_S)
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read(_MAX_ANSWER)


@contextlib.contextmanager
def _refusing(url: str) -> Iterator[None]:
    try:
        yield
    except ssl.SSLCertVerificationError as error:
        raise SourceRefused(
            f"{url} has no certificate of this fleet's CA for that name: {error.verify_message}",
            hint=f"{_NOTHING_SENT}; `imdsproxy fleet hub-certificate` makes a certificate with the names of its URLs",
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise SourceUnavailable(
            f"{url} does not answer: {str(error) or type(error).__name__}"
        ) from error


def _read_issued(
    url: str, status: int, answer: bytes, key: PrivateKey, invited_by: Certificate | None = None
) -> _Issued:
    """Read a certificate for a key, and the CAs, from the answer of a hub that has proved its identity.

    The answer must contain the CA certificate `invited_by`.
    """
    shape: dict[str, Any] = {}
    with contextlib.suppress(ValueError):
        found = json.loads(answer)
        shape = found if isinstance(found, dict) else {}
    if status == _OK:
        certificate, authorities = (
            str(shape.get(part, "")).encode() for part in ("certificate", "authority")
        )
        where = f"the answer of {url}"
        try:
            issued = parse_certificate(certificate, where)
            known = parse_certificates(authorities, f"`authority` in {where}")
        except ConfigInvalid as error:
            raise SourceUnavailable(error.message) from error
        if issued.public_key() != key.public_key():
            raise SourceUnavailable(f"{url} answers with a certificate for another key")
        if not any(is_issued_by(issued, one) for one in known):
            raise SourceUnavailable(
                f"{url} answers with a certificate of a CA that it does not name"
            )
        if invited_by is not None and invited_by not in known:
            raise SourceUnavailable(f"{url} does not name the CA that signed its own certificate")
        return _Issued(certificate, authorities)
    message = str(shape.get("message", f"{url} answers {status}"))
    hint = str(shape.get("hint", ""))
    if status in _DENIED:
        raise AccessDenied(message, hint=hint)
    if status < 500:  # noqa: PLR2004 - HTTP's
        raise RequestRefused(message, hint=hint)
    raise SourceUnavailable(f"{url}: {message}", hint=hint)


async def renew_if_due(
    files: HostFiles, client: HubClient, hubs: Sequence[str], now: datetime
) -> bool:
    """Replace the certificate, with a new key, if renewal is due. Return whether it was replaced.

    Renewal is due after two thirds of the certificate's lifetime, and when the fleet has other CAs than this host
    trusts. A hub that proved its identity by a trusted CA sends the new CA certificates, which are stored.

    Raises:
        AccessDenied: A hub no longer accepts the current certificate.
        ImdsproxyError: A file cannot be used or written, a hub refuses the request, or no hub answers.
    """
    due = renewal_due(_read(files), now)
    key = make_key()
    body = json.dumps({"request": render_request(key).decode()}).encode()
    reasons: list[str] = []
    for url in hubs:
        try:
            others = await _has_other_authorities(files, client, url)
            due = due or others
            if not due:
                return False
            status, answer = await client.request("POST", url, RENEW_PATH, body=body)
            issued = _read_issued(url, status, answer, key)
            _refuse_unusable(url, issued.certificate, now)
        except SourceUnavailable as error:
            reasons.append(error.message)
            continue
        _write_pair(files, key, issued.certificate)
        if others:
            # The CAs come last: if they are not written, the next attempt repeats everything.
            write_atomic(files.authority, issued.authorities, mode=0o644, durable=True)
        return True
    if not due:
        # The source itself reports that no hub answers.
        return False
    raise SourceUnavailable("; ".join(reasons), hint="the host asks the hubs again")


async def _has_other_authorities(files: HostFiles, client: HubClient, url: str) -> bool:
    """Return whether the fleet has other CAs than this host trusts; never if the settings name a file of CAs."""
    if not files.keeps_authority:
        return False
    status, pem = await client.request("GET", url, AUTHORITY_PATH)
    if status != _OK:
        return False
    trusted = parse_certificates(files.authority.read_bytes(), str(files.authority))
    return parse_certificates(pem, f"the answer of {url}") != trusted


def _refuse_unusable(url: str, certificate: bytes, now: datetime) -> None:
    """Refuse a certificate that is not valid now: if a hub's clock is wrong, hubs would reject this host."""
    found = parse_certificate(certificate, f"the answer of {url}")
    if not found.not_valid_before_utc <= now < found.not_valid_after_utc:
        raise SourceUnavailable(
            f"the certificate from {url} is not valid now by this host's clock: one of the two clocks is wrong"
        )


def end_of(files: HostFiles) -> datetime:
    """Return the end of this host's certificate; raises as `renew_if_due`."""
    return _read(files).not_valid_after_utc


def _read(files: HostFiles) -> Certificate:
    return parse_certificate(read_secret(files.certificate), str(files.certificate))


def _write_pair(files: HostFiles, key: PrivateKey, certificate: bytes) -> None:
    """Write key and certificate into one file, so that both are replaced atomically."""
    write_atomic(files.certificate, render_key(key) + certificate, mode=_SECRET, durable=True)
