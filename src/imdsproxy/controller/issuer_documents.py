"""Documents of the issuer of identity tokens: as files for any web server, and as HAProxy serves them with TLS."""

import contextlib
import json
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Final, TypeAlias
from urllib.parse import urlsplit

import structlog

from imdsproxy.config.schema import Settings
from imdsproxy.errors import Problem
from imdsproxy.haproxy.rules.model import IssuerFrontend
from imdsproxy.host.files import ensure_directory, write_atomic
from imdsproxy.issuer.documents import DOCUMENTS, KEYS_PATH

_log: Final = structlog.get_logger()

Documents: TypeAlias = Mapping[str, tuple[str, str]]
"""Documents by path, each with its content type and its text."""


@dataclass(slots=True)
class IssuerDocuments:
    """The issuer's documents on this host.

    Args:
        issuer: URL of the issuer.
        directory: Directory of the documents' files.
        on_change: Callback for changed documents or a changed certificate: HAProxy must load them.

    Attributes:
        current: Documents in force; empty until the signer has answered.
        problem: Reason why HAProxy cannot use the certificate.
    """

    issuer: str
    directory: Path
    on_change: Callable[[], object]
    current: Documents = field(default_factory=dict)
    problem: Problem | None = None
    _followed: tuple[Path, bytes | None] | None = None

    def frontend(self, settings: Settings) -> IssuerFrontend | None:
        """Return the frontend for the documents; `None` without documents, a certificate or an address."""
        listen, certificate = settings.identity.listen, settings.identity.certificate
        self.problem = self._followed = None
        if listen is None or certificate is None or not self.current:
            return None
        self._followed = certificate, _try_read(certificate)
        try:
            # HAProxy would refuse the whole configuration, and guests' networks would not change any more. Without a
            # password here, OpenSSL asks for the password of an encrypted key on the terminal.
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate, password="")
            digest = blake2b(certificate.read_bytes(), digest_size=8)
        except OSError as error:
            self.problem = Problem(
                "identity.certificate",
                f"cannot use {certificate}: {error.strerror or error}",
                "a PEM file with the certificate chain and the private key, which is not encrypted",
            )
            return None
        below = urlsplit(self.issuer).path
        digest.update(repr(self.current).encode())
        documents = (
            (below + path, content_type, str(self._file(path)))
            for path, (content_type, _) in self.current.items()
        )
        return IssuerFrontend(str(listen), str(certificate), digest.hexdigest(), tuple(documents))

    def follow_certificate(self) -> None:
        """Call `on_change` if the certificate's file has changed since the frontend was made."""
        if self._followed is None:
            return
        file, content = self._followed
        if _try_read(file) != content:
            _log.info("issuer's certificate changed", file=str(file))
            self.on_change()

    def load(self) -> None:
        """Take the documents of the last run, so that an adopted HAProxy goes on serving them."""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            self.current = {
                path: (kind, self._file(path).read_text()) for path, kind in DOCUMENTS.items()
            }

    def publish(self, documents: Documents) -> None:
        """Write the documents and have HAProxy load them; raise `HostRefused` if a file cannot be written."""
        for path, (_, text) in documents.items():
            place = self._file(path)
            ensure_directory(place.parent)
            write_atomic(place, text.encode(), mode=0o644)
        self.current = documents
        _log.info("issuer's documents written", directory=str(self.directory))
        self.on_change()

    def _file(self, path: str) -> Path:
        return self.directory / path.lstrip("/")


def find_key_ids(documents: Documents) -> list[str]:
    """Return the ids of the keys in an issuer's documents, the signing key first; empty without documents."""
    try:
        return [one["kid"] for one in json.loads(documents[KEYS_PATH][1])["keys"]]
    except (KeyError, ValueError, TypeError):
        # Documents of the last run are files, which may be damaged.
        return []


def _try_read(file: Path) -> bytes | None:
    """Return a file's content; `None` if the file cannot be read."""
    try:
        return file.read_bytes()
    except OSError:
        return None
