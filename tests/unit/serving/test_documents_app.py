from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from pathlib import Path
from typing import cast

import pytest
import structlog

from imdsproxy.core.compiled import CompiledRecord
from imdsproxy.serving.documents import DocumentService, documents_app
from imdsproxy.serving.http import (
    BODY_LIMIT,
    Answer,
    AsgiApp,
    BodyTooLarge,
    FilePart,
    Unfinished,
    read_body,
    send_answer,
)
from imdsproxy.serving.store import PasswordStore, RecordReader, apply_record
from support.guest_records import GUEST, compiled, guest

INSTANCE = (b"x-imdsproxy-instance", GUEST.id.encode())


class Exchange:
    """One request to an ASGI application, and what it sent."""

    def __init__(self, app: AsgiApp) -> None:
        self._app = app
        self.sent: list[MutableMapping[str, object]] = []
        self.received = 0

    async def ask(
        self,
        path: bytes,
        method: str = "GET",
        *,
        headers: Iterable[tuple[bytes, bytes]] = (INSTANCE,),
        body: Iterable[bytes] = (),
        complete: bool = True,
    ) -> int | None:
        parts = list(body) or [b""]
        messages: list[MutableMapping[str, object]] = [
            {
                "type": "http.request",
                "body": part,
                "more_body": not complete or number + 1 < len(parts),
            }
            for number, part in enumerate(parts)
        ]

        async def receive() -> MutableMapping[str, object]:
            self.received += 1
            return messages.pop(0) if messages else {"type": "http.disconnect"}

        async def send(message: MutableMapping[str, object]) -> None:
            self.sent.append(message)

        scope = {"type": "http", "method": method, "raw_path": path, "headers": list(headers)}
        await self._app(scope, receive, send)
        if not self.sent:
            return None
        status = self.sent[0]["status"]
        assert isinstance(status, int)
        return status

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)

    @property
    def pieces(self) -> list[bytes]:
        return [cast("bytes", message["body"]) for message in self.sent[1:]]

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(cast("list[tuple[bytes, bytes]]", self.sent[0]["headers"]))


@pytest.fixture
def record() -> CompiledRecord:
    return compiled(guest(user_data=bytes(range(256)) * 8192))


@pytest.fixture
def exchange(tmp_path: Path, record: CompiledRecord) -> Exchange:
    apply_record(tmp_path / "documents", GUEST.id, record)
    (tmp_path / "passwords").mkdir()
    service = DocumentService(
        RecordReader(tmp_path / "documents", capacity=1 << 20),
        PasswordStore(tmp_path / "passwords"),
    )
    return Exchange(documents_app(service))


async def test_the_named_instance_is_answered(exchange: Exchange) -> None:
    assert await exchange.ask(b"/latest/meta-data/instance-id") == 200
    assert exchange.body == GUEST.ec2_id.encode()
    assert exchange.headers == {
        b"content-type": b"text/plain; charset=utf-8",
        b"content-length": b"19",
    }


async def test_the_revision_header_decides_what_is_cached(
    exchange: Exchange, record: CompiledRecord
) -> None:
    headers = (INSTANCE, (b"x-imdsproxy-revision", record.revision.encode()))
    await exchange.ask(b"/latest/meta-data/instance-id", headers=headers)
    assert exchange.headers[b"cache-control"] == b"max-age=3600"


async def test_liveness_needs_no_instance(exchange: Exchange) -> None:
    assert await exchange.ask(b"/livez", headers=()) == 200


async def test_a_guests_livez_is_a_document_that_there_is_not(exchange: Exchange) -> None:
    assert await exchange.ask(b"/livez") == 404


@pytest.mark.parametrize(
    "headers",
    [
        (),
        (INSTANCE, INSTANCE),
        ((b"x-imdsproxy-instance", b""),),
        ((b"x-imdsproxy-instance", b"../etc/passwd"),),
        ((b"x-imdsproxy-instance", b"a" * 65),),
        ((b"x-imdsproxy-instance", b"-a"),),
        ((b"x-imdsproxy-instance", b"a\n"),),
        ((b"x-imdsproxy-instance", b"\xff"),),
    ],
)
async def test_no_instance_or_a_bad_one_is_400(
    exchange: Exchange, headers: tuple[tuple[bytes, bytes], ...]
) -> None:
    assert await exchange.ask(b"/latest", headers=headers) == 400


async def test_an_instance_without_a_record_is_503(exchange: Exchange) -> None:
    with structlog.testing.capture_logs():
        assert await exchange.ask(b"/latest", headers=((b"x-imdsproxy-instance", b"other"),)) == 503
    assert exchange.headers[b"retry-after"] == b"1"


async def test_a_body_in_pieces_is_read_whole(exchange: Exchange) -> None:
    path = b"/openstack/latest/password"
    assert await exchange.ask(path, "POST", body=[b"c2Vj", b"", b"cmV0"]) == 200
    exchange.sent.clear()
    await exchange.ask(path)
    assert exchange.body == b"c2VjcmV0"


async def test_a_get_does_not_wait_for_a_body(exchange: Exchange) -> None:
    assert await exchange.ask(b"/latest", body=[b"x"], complete=False) == 200
    assert exchange.received == 0


async def test_a_body_that_is_too_long_is_413_before_it_ends(exchange: Exchange) -> None:
    pieces = [b"x" * 10_000] * 100
    assert await exchange.ask(b"/openstack/latest/password", "POST", body=pieces) == 413
    assert exchange.received <= BODY_LIMIT // 10_000 + 1


async def test_a_client_that_leaves_gets_nothing(exchange: Exchange) -> None:
    assert (
        await exchange.ask(b"/openstack/latest/password", "POST", body=[b"a"], complete=False)
        is None
    )


async def test_long_user_data_goes_out_in_pieces_and_exact(exchange: Exchange) -> None:
    assert await exchange.ask(b"/latest/user-data") == 200
    assert exchange.body == bytes(range(256)) * 8192
    assert exchange.headers[b"content-length"] == b"%d" % (256 * 8192)
    assert max(map(len, exchange.pieces)) <= 256 * 1024


async def test_a_fault_of_ours_is_503_and_logged(
    exchange: Exchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_args: object, **_keywords: object) -> Answer:
        raise ZeroDivisionError

    monkeypatch.setattr(DocumentService, "answer", fail)
    with structlog.testing.capture_logs() as events:
        assert await exchange.ask(b"/latest") == 503
    assert exchange.headers[b"retry-after"] == b"1"
    assert events[0]["log_level"] == "error"


async def test_other_protocols_are_refused(exchange: Exchange) -> None:
    async def receive() -> MutableMapping[str, object]:
        return {}

    async def send(_message: MutableMapping[str, object]) -> None:
        raise AssertionError

    with pytest.raises(ValueError, match="websocket"):
        await exchange._app({"type": "websocket"}, receive, send)


async def test_a_body_is_limited_as_asked() -> None:
    async def receive() -> MutableMapping[str, object]:
        return {"type": "http.request", "body": b"abc"}

    assert await read_body(receive, limit=3) == b"abc"
    assert isinstance(await read_body(receive, limit=2), BodyTooLarge)


async def test_a_disconnect_is_not_a_body() -> None:
    async def receive() -> MutableMapping[str, object]:
        return {"type": "http.disconnect"}

    assert isinstance(await read_body(receive), Unfinished)


async def test_a_file_that_ends_early_breaks_the_answer_off_and_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(b"abc")
    file = path.open("rb")

    async def send(_message: MutableMapping[str, object]) -> None:
        return

    with pytest.raises(EOFError):
        await send_answer(Answer(200, (), FilePart(file, 1, 10)), send)
    assert file.closed
