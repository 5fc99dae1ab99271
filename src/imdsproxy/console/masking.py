"""Secrets in documents, hidden until the operator reveals them."""

import re
from typing import Final

HIDDEN: Final = "(hidden)"
_SECRET: Final = frozenset(
    {
        "user-data",
        "user_data",
        "vendor-data",
        "vendor_data",
        "vendor_data.json",
        "vendor_data2.json",
        "password",
    }
)
"""Names of documents that are entirely secret."""

_KEY: Final = re.compile(r"((?:ssh|ecdsa|sk-ssh|sk-ecdsa)-[\w@.-]+ )[A-Za-z0-9+/=\\]{16,}")
_VALUE: Final = re.compile(r'("(?:random_seed|admin_pass|password)": ?")(?:[^"\\]|\\.)*')


def is_secret(path: str) -> bool:
    """Return whether a document is entirely secret, for any spelling of its path."""
    names = [name for name in path.partition("?")[0].split("/") if name]
    return any(name in _SECRET for name in names) or "%" in path


def mask_secrets(text: str) -> str:
    return _VALUE.sub(rf"\1{HIDDEN}", _KEY.sub(rf"\1{HIDDEN}", text))
