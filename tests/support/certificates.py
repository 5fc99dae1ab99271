"""Certificates of an authority of a test's own, made by openssl(1)."""

import ssl
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_CONFIGURATION: Final = "[req]\ndistinguished_name = subject\n[subject]\n"
"""No extension but those that are asked for."""

_KEY: Final = (
    "-newkey",
    "ec",
    "-pkeyopt",
    "ec_paramgen_curve:prime256v1",
    "-nodes",
    "-days",
    "400",
)


@dataclass(frozen=True, slots=True)
class Certificate:
    """A certificate and its key.

    Attributes:
        certificate: PEM file of the certificate alone.
        key: PEM file of the key alone.
        bundle: PEM file of both.
    """

    certificate: Path
    key: Path
    bundle: Path


@dataclass(frozen=True, slots=True)
class Authority:
    """Somebody who signs certificates."""

    own: Certificate

    @property
    def ca_file(self) -> Path:
        return self.own.certificate

    def issue(
        self, name: str, *, names: Sequence[str] = (), subject: str | None = None
    ) -> Certificate:
        """Sign a certificate.

        Args:
            name: Of its files.
            names: Whom it is for, as `DNS:…` or `IP:…`.
            subject: As openssl(1) takes it; without it the name is the common name.
        """
        signer = ("-CA", str(self.own.certificate), "-CAkey", str(self.own.key))
        extensions = ["basicConstraints=critical,CA:FALSE"]
        if names:
            extensions.append(f"subjectAltName={','.join(names)}")
        return _make(self.own.certificate.parent, name, extensions, *signer, subject=subject)


def make_authority(directory: Path, name: str) -> Authority:
    """Make an authority, whose certificates will lie beside its own."""
    extensions = ["basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign"]
    return Authority(_make(directory, name, extensions))


def server_context(certificate: Certificate, *, clients: Authority | None = None) -> ssl.SSLContext:
    """A server's side of TLS.

    Args:
        clients: Who must have signed the certificate that clients show; without it they need none.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.certificate, certificate.key)
    if clients is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(clients.ca_file)
    return context


def _make(
    directory: Path,
    name: str,
    extensions: Sequence[str],
    *options: str,
    subject: str | None = None,
) -> Certificate:
    certificate, key, bundle = (directory / f"{name}.{end}" for end in ("crt", "key", "pem"))
    added = [word for extension in extensions for word in ("-addext", extension)]
    subprocess.run(
        ("/usr/bin/openssl", "req", "-x509", "-config", "/dev/stdin", *_KEY, "-subj", subject or f"/CN={name}",
         *added, *options, "-keyout", str(key), "-out", str(certificate)),
        input=_CONFIGURATION.encode(),
        check=True,
        capture_output=True,
    )  # fmt: skip
    bundle.write_bytes(certificate.read_bytes() + key.read_bytes())
    for file in (key, bundle):
        file.chmod(0o600)
    return Certificate(certificate, key, bundle)
