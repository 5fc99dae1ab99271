from __future__ import annotations

import os
from pathlib import Path
from typing import TypeAlias

import pytest
import structlog

from imdsproxy.core.compiled import compiled_path
from imdsproxy.core.documents.respond import DocumentRequest
from imdsproxy.core.model import Instance, InstanceId
from imdsproxy.serving.documents import DocumentService
from imdsproxy.serving.http import Answer, FilePart
from imdsproxy.serving.store import PasswordStore, RecordReader, apply_record, remove_record
from support.guest_records import GUEST, SEED, compiled, guest, with_head

META_DATA = "/openstack/latest/meta_data.json"
PASSWORD = "/openstack/latest/password"
Events: TypeAlias = "list[dict[str, object]]"


class Serving:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "passwords").mkdir()
        self.service = DocumentService(
            RecordReader(directory / "documents", capacity=1 << 20),
            PasswordStore(directory / "passwords"),
            random_bytes=lambda length: SEED[:length],
        )

    def write(self, instance: Instance) -> str:
        record = compiled(instance)
        apply_record(self.directory / "documents", instance.id, record)
        return record.revision

    async def ask(
        self, path: str, method: str = "GET", body: bytes = b"", *, revision: str | None = None
    ) -> Answer:
        request = DocumentRequest(method, path.encode(), body)
        return await self.service.answer(GUEST.id, request, revision=revision)


@pytest.fixture
def serving(tmp_path: Path) -> Serving:
    return Serving(tmp_path)


def names(answer: Answer) -> dict[bytes, bytes]:
    return dict(answer.headers)


async def test_a_document_of_the_current_revision_may_be_cached(serving: Serving) -> None:
    revision = serving.write(GUEST)
    answer = await serving.ask("/latest/meta-data/instance-id", revision=revision)
    assert (answer.status, answer.body) == (200, GUEST.ec2_id.encode())
    assert names(answer)[b"cache-control"] == b"max-age=3600"


@pytest.mark.parametrize("revision", ["0" * 16, None, ""])
async def test_a_document_of_another_revision_is_served_and_not_cached(
    serving: Serving, revision: str | None
) -> None:
    serving.write(GUEST)
    answer = await serving.ask("/latest/meta-data/instance-id", revision=revision)
    assert (answer.status, answer.body) == (200, GUEST.ec2_id.encode())
    assert b"cache-control" not in names(answer)


async def test_a_record_of_another_version_is_served_and_not_cached(serving: Serving) -> None:
    """During an upgrade, until both processes are of one version."""
    serving.write(GUEST)
    content = with_head(b'format":2,', b'format":3,"more":1,')
    (serving.directory / "documents" / compiled_path(GUEST.id)).write_bytes(content)
    for revision in (content[13:29].decode(), ""):
        answer = await serving.ask("/latest/meta-data/instance-id", revision=revision)
        assert (answer.status, answer.body) == (200, GUEST.ec2_id.encode())
        assert b"cache-control" not in names(answer)


@pytest.mark.parametrize("path", [META_DATA, PASSWORD, "/nothing", "/%"])
async def test_what_changes_without_the_record_is_never_cached(serving: Serving, path: str) -> None:
    revision = serving.write(GUEST)
    assert b"cache-control" not in names(await serving.ask(path, revision=revision))


async def test_an_update_is_seen_by_the_next_request(serving: Serving) -> None:
    serving.write(GUEST)
    await serving.ask("/latest/meta-data/hostname")
    revision = serving.write(guest(hostname="web.example.net"))
    answer = await serving.ask("/latest/meta-data/hostname", revision=revision)
    assert answer.body == b"web.example.net"
    assert b"cache-control" in names(answer)


async def test_a_file_that_looks_the_same_is_read_again_for_another_revision(
    serving: Serving,
) -> None:
    serving.write(GUEST)
    path = serving.directory / "documents" / compiled_path(GUEST.id)
    await serving.ask("/latest/meta-data/hostname")
    before = path.stat()
    changed = compiled(guest(hostname="wab.example.org"))
    with path.open("r+b") as file:
        file.write(changed.content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    answer = await serving.ask("/latest/meta-data/hostname", revision=changed.revision)
    assert answer.body == b"wab.example.org"


async def test_a_missing_record_is_503_and_told_once(serving: Serving) -> None:
    with structlog.testing.capture_logs() as events:
        for _ in range(3):
            answer = await serving.ask("/latest/meta-data/instance-id", revision="0" * 16)
            assert answer.status == 503
            assert names(answer) == {b"retry-after": b"1", b"content-length": b"0"}
    assert [event["log_level"] for event in events] == ["warning"]
    assert events[0]["instance"] == GUEST.id


async def test_a_damaged_record_is_503_never_404(serving: Serving) -> None:
    serving.write(GUEST)
    path = serving.directory / "documents" / compiled_path(GUEST.id)
    path.write_bytes(path.read_bytes()[:-3])
    with structlog.testing.capture_logs() as events:
        answer = await serving.ask("/nothing")
    assert answer.status == 503
    assert "checksum" in str(events[0]["reason"])
    serving.write(GUEST)
    assert (await serving.ask("/latest/meta-data/instance-id")).status == 200


async def test_a_fault_that_comes_back_is_told_again(serving: Serving) -> None:
    with structlog.testing.capture_logs() as events:
        await serving.ask("/")
        serving.write(GUEST)
        await serving.ask("/")
        remove_record(serving.directory / "documents", GUEST.id)
        await serving.ask("/")
    assert len(events) == 2


async def test_short_user_data_is_bytes_and_long_is_a_file(serving: Serving) -> None:
    serving.write(guest(user_data=b"\x1f\x8b\xff"))
    assert (await serving.ask("/latest/user-data")).body == b"\x1f\x8b\xff"
    data = os.urandom(1 << 20)
    serving.write(guest(user_data=data))
    part = (await serving.ask("/latest/user-data")).body
    assert isinstance(part, FilePart)
    with part.file as file:
        file.seek(part.offset)
        assert file.read(part.length) == data
    assert (await serving.ask("/latest/user-data", "HEAD")).body == b""


async def test_a_password_is_kept_once(serving: Serving) -> None:
    serving.write(GUEST)
    assert (await serving.ask(PASSWORD)).body == b""
    assert (await serving.ask(PASSWORD, "POST", b"c2VjcmV0")).status == 200
    assert (await serving.ask(PASSWORD)).body == b"c2VjcmV0"
    assert (await serving.ask(PASSWORD, "POST", b"other")).status == 409
    serving.write(guest(hostname="renamed"))
    assert (await serving.ask(PASSWORD)).body == b"c2VjcmV0"


async def test_of_two_passwords_at_once_the_second_is_409(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving.write(GUEST)
    PasswordStore(serving.directory / "passwords").keep(GUEST.id, b"first")
    monkeypatch.setattr(PasswordStore, "read", lambda _self, _id: None)
    assert (await serving.ask(PASSWORD, "POST", b"second")).status == 409


async def test_a_password_that_cannot_be_kept_is_503(serving: Serving) -> None:
    serving.write(GUEST)
    (serving.directory / "passwords").rmdir()
    with structlog.testing.capture_logs() as events:
        assert (await serving.ask(PASSWORD, "POST", b"c2VjcmV0")).status == 503
    assert "password" in str(events[0]["reason"])


async def test_notes_of_faults_do_not_grow_for_ever(serving: Serving) -> None:
    request = DocumentRequest("GET", b"/")
    with structlog.testing.capture_logs():
        for number in range(1100):
            await serving.service.answer(InstanceId(f"vm-{number}"), request)
    assert len(serving.service._noted) <= 1024
