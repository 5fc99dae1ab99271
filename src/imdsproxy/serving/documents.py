"""Answers for guests out of compiled records, for the document server and the resolver alike."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO, Final

import structlog

from imdsproxy.core.compiled import Blob
from imdsproxy.core.documents import (
    SEED_LENGTH,
    DocumentRequest,
    DocumentResponse,
    respond,
)
from imdsproxy.core.documents.respond import Header
from imdsproxy.core.model import InstanceId
from imdsproxy.core.wire import RETRY_AFTER_S
from imdsproxy.errors import HostRefused, PrivilegeMissing, RecordCorrupt
from imdsproxy.serving.passwords import PasswordStore
from imdsproxy.serving.store import LoadedRecord, RecordReader

_LIFETIME: Final = (b"cache-control", b"max-age=3600")
"""Between here and HAProxy's cache, whose key holds the revision; HAProxy takes it away again."""

_REPLACED_AT_MOST: Final = 3
_NOTED_AT_MOST: Final = 1024


@dataclass(frozen=True, slots=True)
class FilePart:
    """A piece of an open file; the sender closes it."""

    file: BinaryIO
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What goes out; header names are in lower case, Content-Length is among them."""

    status: int
    headers: tuple[Header, ...]
    body: bytes | FilePart = b""


def refusal(status: int, *headers: Header, text: str = "") -> Answer:
    """An answer without a document.

    Args:
        status: Its status.
        headers: Beside those of the body.
        text: One line for people; without it there is no body.
    """
    kind = ((b"content-type", b"text/plain"),) if text else ()
    body = text.encode("ascii")
    return Answer(status, (*headers, *kind, (b"content-length", b"%d" % len(body))), body)


def retry_later() -> Answer:
    """503 that makes a client come again: what it asked for is there, but cannot be had now."""
    return refusal(503, (b"retry-after", b"%d" % RETRY_AFTER_S))


class DocumentService:
    """Answers for every instance that has a compiled record.

    Args:
        records: Where the records are read.
        passwords: Where guests' passwords are kept.
        random_bytes: Gives so many fresh random bytes.
    """

    def __init__(
        self,
        records: RecordReader,
        passwords: PasswordStore,
        *,
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._records = records
        self._passwords = passwords
        self._random_seed = partial(random_bytes, SEED_LENGTH)
        self._noted: dict[InstanceId, str] = {}
        self._log = structlog.get_logger()

    async def answer(
        self, instance_id: InstanceId, request: DocumentRequest, *, revision: str | None = None
    ) -> Answer:
        """The answer to the instance.

        A record that is missing, damaged or unreadable is 503 and never 404: the sender of the request knows
        that the instance exists. It is logged once until it is well again.

        Args:
            instance_id: Who asks.
            request: What it asks.
            revision: The record's revision as the data plane knows it. While the one on disk is another, the
                answer is right, but not marked for HAProxy's cache. `None`: never marked.
        """
        try:
            for _ in range(_REPLACED_AT_MOST):
                loaded = self._load(instance_id, revision)
                if loaded is None:
                    self._note(instance_id, "its compiled record is missing")
                    return retry_later()
                answer = await self._answer(instance_id, loaded, request, revision)
                if answer is not None:
                    self._noted.pop(instance_id, None)
                    return answer
        except (RecordCorrupt, HostRefused, PrivilegeMissing) as error:
            self._note(instance_id, str(error))
        return retry_later()

    def _load(self, instance_id: InstanceId, revision: str | None) -> LoadedRecord | None:
        loaded = self._records.load(instance_id)
        if loaded is None or revision is None or loaded.tree.record.revision == revision:
            return loaded
        # A file's inode, size and time can be the same after two quick changes; its revision cannot.
        return self._records.load(instance_id, fresh=True)

    async def _answer(
        self,
        instance_id: InstanceId,
        loaded: LoadedRecord,
        request: DocumentRequest,
        revision: str | None,
    ) -> Answer | None:
        """The answer; `None` when the record has been replaced meanwhile."""
        response = respond(
            request,
            loaded.tree,
            random_seed=self._random_seed,
            password=partial(self._passwords.read, instance_id),
        )
        if response.new_password is not None:
            kept = await asyncio.to_thread(self._passwords.keep, instance_id, response.new_password)
            if not kept:
                return refusal(409)
        body = self._body(loaded, response)
        if body is None:
            return None
        headers = response.headers
        if response.cacheable and revision and loaded.tree.record.revision == revision:
            headers = (*headers, _LIFETIME)
        return Answer(response.status, headers, body)

    def _body(self, loaded: LoadedRecord, response: DocumentResponse) -> bytes | FilePart | None:
        if not isinstance(response.body, Blob):
            return response.body
        blob = response.body
        if loaded.content is not None:
            return loaded.content[blob.offset : blob.offset + blob.length]
        file = self._records.open_content(loaded)
        return None if file is None else FilePart(file, blob.offset, blob.length)

    def _note(self, instance_id: InstanceId, reason: str) -> None:
        if self._noted.get(instance_id) == reason:
            return
        if len(self._noted) >= _NOTED_AT_MOST:
            self._noted.clear()
        self._noted[instance_id] = reason
        self._log.warning("an instance gets no documents", instance=instance_id, reason=reason)
