"""Signatures of instance identity documents in AWS's three forms.

Source: AWS, "Verify the instance identity document". The issuer's RSA key makes all of them: AWS's own `pkcs7` is DSA,
and `openssl smime` takes either. No form has a time in it, so the same document and key give the same bytes.
"""

from base64 import encodebytes
from typing import Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, pkcs7

from imdsproxy.issuer.keys import SigningKey

_OPTIONS: Final = (
    pkcs7.PKCS7Options.Binary,
    pkcs7.PKCS7Options.NoAttributes,
    pkcs7.PKCS7Options.NoCerts,
)


def sign_document(text: str, key: SigningKey) -> dict[str, str] | None:
    """Return the document and its signatures by their names below `instance-identity`; `None` without an RSA key."""
    if not isinstance(key.private, rsa.RSAPrivateKey):
        return None
    data = text.encode()
    signature = key.private.sign(data, padding.PKCS1v15(), hashes.SHA256())
    builder = pkcs7.PKCS7SignatureBuilder().set_data(data)
    builder = builder.add_signer(key.certificate, key.private, hashes.SHA256())
    attached = _spell(builder.sign(Encoding.DER, _OPTIONS))
    return {
        "document": text,
        "signature": _spell(signature),
        "pkcs7": attached,
        "rsa2048": attached,
    }


def _spell(data: bytes) -> str:
    """Return base64 in lines, as AWS has it, without a newline at the end."""
    return encodebytes(data).decode().rstrip("\n")
