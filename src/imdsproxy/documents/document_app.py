"""Document server as an ASGI application: answers guests from compiled records."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import BinaryIO, Final, TypeAlias, cast

import structlog

from imdsproxy.documents.compiled import Blob
from imdsproxy.documents.dialects import respond
from imdsproxy.documents.http import LIVENESS_PATH, Receive, Scope, Send, read_body, send_answer
from imdsproxy.documents.store import PasswordStore, RecordReader
from imdsproxy.errors import HostRefused, PrivilegeMissing, RecordCorrupt
from imdsproxy.model.entities import ID_PATTERN, InstanceId
from imdsproxy.model.wire import HEADER_INSTANCE, HEADER_REVISION, PROBE_INSTANCE

_LIFETIME: Final = (b"cache-control", b"max-age=3600")
"""Header for HAProxy's cache, whose key contains the revision; HAProxy removes the header."""

_INSTANCE_HEADER: Final = HEADER_INSTANCE.encode("ascii")
_REVISION_HEADER: Final = HEADER_REVISION.encode("ascii")
_INSTANCE_ID: Final = re.compile(f"{ID_PATTERN}|{re.escape(PROBE_INSTANCE)}".encode())
_BODILESS: Final = frozenset({"GET", "HEAD"})
_REPLACED_AT_MOST: Final = 3
_NOTED_AT_MOST: Final = 1024

_log: Final = structlog.get_logger()

_Found: TypeAlias = "tuple[respond.Answer, BinaryIO | None]"
"""Answer, and the file of its body if the body is not in memory."""


@dataclass(slots=True)
class DocumentService:
    """ASGI application that answers for every instance that HAProxy names and that has a compiled record."""

    records: RecordReader
    passwords: PasswordStore
    random_bytes: Callable[[int], bytes] = os.urandom
    _noted: dict[InstanceId, str] = field(default_factory=dict)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            found = await self._answer(scope, receive)
        except Exception:  # noqa: BLE001 - logged; a fault of ours is answered like one that goes away
            # A 500 ends boots: cloud-init's OpenStack source retries only after 503.
            _log.exception("a request failed", path=repr(scope["raw_path"]))
            found = respond.retry_later(), None
        if found is not None:
            answer, file = found
            await send_answer(answer, send, file)

    async def _answer(self, scope: Scope, receive: Receive) -> _Found | None:
        """Return the answer to the instance; `None` if the client has disconnected.

        A missing, damaged or unreadable record leads to 503, never 404: HAProxy knows that the instance exists. The
        fault is logged once until the record is readable again.
        """
        headers = cast("Iterable[respond.Header]", scope["headers"])
        path, method = cast("bytes", scope["raw_path"]), cast("str", scope["method"])
        instances = [value for name, value in headers if name == _INSTANCE_HEADER]
        if not instances and path == LIVENESS_PATH:
            return respond.refusal(200), None
        if len(instances) != 1 or not _INSTANCE_ID.fullmatch(instances[0]):
            return respond.refusal(400), None
        body = b"" if method in _BODILESS else await read_body(receive)
        if not isinstance(body, bytes):
            return None if body is None else (body, None)
        instance = InstanceId(instances[0].decode("ascii"))
        revisions = (value.decode("latin-1") for name, value in headers if name == _REVISION_HEADER)
        revision = next(revisions, None)
        try:
            for _ in range(_REPLACED_AT_MOST):
                found = await self._look_up(instance, revision, method, path, body)
                if found is not None:
                    return found
        except (RecordCorrupt, HostRefused, PrivilegeMissing) as error:
            self._note(instance, str(error))
        return respond.retry_later(), None

    async def _look_up(
        self, instance: InstanceId, revision: str | None, method: str, path: bytes, body: bytes
    ) -> _Found | None:
        """Return the answer; `None` if the record has been replaced meanwhile.

        If the record on disk has another revision than the data plane's, the answer is right, but not marked for
        HAProxy's cache.
        """
        loaded = self.records.load(instance)
        if loaded is not None and revision not in (None, loaded.tree.record["revision"]):
            # Two quick changes can leave a file's inode, size and time unchanged, but not its revision.
            loaded = self.records.load(instance, fresh=True)
        if loaded is None:
            self._note(instance, "its compiled record is missing")
            return respond.retry_later(), None
        seed = partial(self.random_bytes, respond.SEED_LENGTH)
        password = partial(self.passwords.read, instance)
        answer = respond.respond(
            method, path, body, loaded.tree, random_seed=seed, password=password
        )
        new = answer.new_password
        if new is not None and not await asyncio.to_thread(self.passwords.keep, instance, new):
            return respond.refusal(409), None
        file = None
        if isinstance(part := answer.body, Blob):
            if loaded.content is not None:
                data = loaded.content[part.offset : part.offset + part.length]
                answer = replace(answer, body=data)
            elif (file := self.records.open_content(loaded)) is None:
                return None
        self._noted.pop(instance, None)
        if answer.cacheable and revision and loaded.tree.record["revision"] == revision:
            answer = replace(answer, headers=(*answer.headers, _LIFETIME))
        return answer, file

    def _note(self, instance: InstanceId, reason: str) -> None:
        if self._noted.get(instance) == reason:
            return
        if len(self._noted) >= _NOTED_AT_MOST:
            self._noted.clear()
        self._noted[instance] = reason
        _log.warning("an instance gets no documents", instance=instance, reason=reason)
