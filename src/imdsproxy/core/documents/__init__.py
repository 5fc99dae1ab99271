"""What a guest reads: one module per dialect, and the tree that they share."""

from imdsproxy.core.documents.respond import (
    PASSWORD_LIMIT,
    SEED_LENGTH,
    DocumentRequest,
    DocumentResponse,
    DocumentTree,
    respond,
)

__all__ = [
    "PASSWORD_LIMIT",
    "SEED_LENGTH",
    "DocumentRequest",
    "DocumentResponse",
    "DocumentTree",
    "respond",
]
