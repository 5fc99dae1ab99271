"""Answers for guests out of compiled records, and the document server as an ASGI application."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Final, cast

import structlog

from imdsproxy.core.compiled import Blob
from imdsproxy.core.documents.respond import (
    SEED_LENGTH,
    DocumentRequest,
    DocumentResponse,
    Header,
    respond,
)
from imdsproxy.core.model import ID_PATTERN, InstanceId
from imdsproxy.core.wire import HEADER_INSTANCE, HEADER_REVISION, PROBE_INSTANCE
from imdsproxy.errors import HostRefused, PrivilegeMissing, RecordCorrupt
from imdsproxy.serving.http import (
    LIVENESS_PATH,
    Answer,
    AsgiApp,
    BodyTooLarge,
    FilePart,
    Receive,
    Scope,
    Send,
    Unfinished,
    read_body,
    refusal,
    retry_later,
    send_answer,
)
from imdsproxy.serving.store import LoadedRecord, PasswordStore, RecordReader

_LIFETIME: Final = (b"cache-control", b"max-age=3600")
"""Between here and HAProxy's cache, whose key holds the revision; HAProxy takes it away again."""

_INSTANCE_HEADER: Final = HEADER_INSTANCE.encode("ascii")
_REVISION_HEADER: Final = HEADER_REVISION.encode("ascii")
_INSTANCE_ID: Final = re.compile(f"{ID_PATTERN}|{re.escape(PROBE_INSTANCE)}".encode())
_BODILESS: Final = frozenset({"GET", "HEAD"})
_REPLACED_AT_MOST: Final = 3
_NOTED_AT_MOST: Final = 1024


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


def documents_app(service: DocumentService) -> AsgiApp:
    """The application that answers for the instances that HAProxy names in its headers."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise ValueError(f"the document server does not speak {scope['type']}")
        try:
            answer = await _answer(service, scope, receive)
        except Exception:  # noqa: BLE001 - logged; a fault of ours is answered like one that goes away
            # A 500 ends boots: cloud-init's OpenStack source comes again only on 503.
            structlog.get_logger().exception("a request failed", path=repr(scope["raw_path"]))
            answer = retry_later()
        if answer is not None:
            await send_answer(answer, send)

    return app


async def _answer(service: DocumentService, scope: Scope, receive: Receive) -> Answer | None:
    headers = cast("Iterable[Header]", scope["headers"])
    path = cast("bytes", scope["raw_path"])
    instances = [value for name, value in headers if name == _INSTANCE_HEADER]
    if not instances and path == LIVENESS_PATH:
        return refusal(200)
    if len(instances) != 1 or not _INSTANCE_ID.fullmatch(instances[0]):
        return refusal(400)
    method = cast("str", scope["method"])
    body = b"" if method in _BODILESS else await read_body(receive)
    if isinstance(body, BodyTooLarge):
        return refusal(413)
    if isinstance(body, Unfinished):
        return None
    revisions = (value.decode("latin-1") for name, value in headers if name == _REVISION_HEADER)
    return await service.answer(
        InstanceId(instances[0].decode("ascii")),
        DocumentRequest(method, path, body),
        revision=next(revisions, None),
    )
