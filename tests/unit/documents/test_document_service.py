"""The document server as HAProxy asks it: headers and bodies in, answers out of records on disk."""

import errno
import os
import stat
import threading
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import structlog

from imdsproxy.documents.compiled import Blob, compiled_path
from imdsproxy.documents.dialects.respond import Answer, Header
from imdsproxy.documents.document_app import DocumentService
from imdsproxy.documents.http import BODY_LIMIT, send_answer
from imdsproxy.documents.resolver_app import CollectedAnswer
from imdsproxy.documents.store import DiskFiles, LoadedRecord, PasswordStore, RecordReader
from imdsproxy.errors import HostRefused, PrivilegeMissing
from imdsproxy.model.entities import Instance, InstanceId
from support.guest_records import GUEST, SEED, compiled, guest, with_head
from support.record_files import last_written, write_record

META_DATA: Final = "/openstack/latest/meta_data.json"
PASSWORD: Final = "/openstack/latest/password"
ID: Final = "/latest/meta-data/instance-id"
HOSTNAME: Final = "/latest/meta-data/hostname"
INSTANCE: Final = (b"x-imdsproxy-instance", GUEST.id.encode())
CACHED: Final = (b"cache-control", b"max-age=3600")


@dataclass
class Reply(CollectedAnswer):
    """What was sent for one request, its largest piece, and how many messages were taken of the request."""

    largest: int = 0
    received: int = 0

    async def take(self, message: MutableMapping[str, Any]) -> None:
        self.largest = max(self.largest, len(message.get("body", b"")))
        await CollectedAnswer.take(self, message)


class Serving:
    """A document server's application over a directory."""

    def __init__(self, directory: Path) -> None:
        self.records, self.passwords = directory / "documents", directory / "passwords"
        self.passwords.mkdir()
        self.service = DocumentService(
            RecordReader(self.records, capacity=1 << 20),
            PasswordStore(self.passwords),
            random_bytes=lambda length: SEED[:length],
        )
        self.file = self.records / compiled_path(GUEST.id)

    def write(self, instance: Instance = GUEST) -> str:
        """Put the instance's record there; its revision."""
        return write_record(self.records, instance).revision

    async def ask(
        self,
        path: str,
        method: str = "GET",
        *body: bytes,
        revision: str | None = None,
        headers: Iterable[Header] = (INSTANCE,),
        complete: bool = True,
    ) -> Reply:
        reply, parts = Reply(), list(body) or [b""]
        messages: list[MutableMapping[str, object]] = [
            {"type": "http.request", "body": part, "more_body": True} for part in parts
        ]
        messages[-1]["more_body"] = not complete

        async def receive() -> MutableMapping[str, object]:
            reply.received += 1
            return messages.pop(0) if messages else {"type": "http.disconnect"}

        more = [] if revision is None else [(b"x-imdsproxy-revision", revision.encode())]
        scope = {"type": "http", "method": method, "raw_path": path.encode()}
        await self.service({**scope, "headers": [*headers, *more]}, receive, reply.take)
        return reply


@pytest.fixture
def serving(tmp_path: Path) -> Serving:
    return Serving(tmp_path)


@pytest.mark.parametrize("revision", ["0" * 16, None, ""])
@pytest.mark.parametrize("other_version", [False, True])
async def test_a_document_of_another_revision_or_version_is_served_and_not_cached(
    serving: Serving, revision: str | None, *, other_version: bool
) -> None:
    serving.write()
    if other_version:
        # During an upgrade, until both processes are of one version.
        content = with_head(b'format":2,', b'format":3,"more":1,')
        serving.file.write_bytes(content)
        revision = content[13:29].decode() if revision else revision
    reply = await serving.ask(ID, revision=revision)
    assert (reply.status, bytes(reply.body)) == (200, GUEST.ec2_id.encode())
    assert CACHED not in reply.headers


@pytest.mark.parametrize("path", [ID, META_DATA, PASSWORD, "/nothing", "/%"])
async def test_only_what_changes_with_the_record_may_be_cached(serving: Serving, path: str) -> None:
    reply = await serving.ask(path, revision=serving.write())
    length = (b"content-length", b"%d" % len(reply.body))
    assert length in reply.headers
    assert (CACHED in reply.headers) == (path == ID)


async def test_an_update_is_seen_by_the_next_request(serving: Serving) -> None:
    serving.write()
    await serving.ask(HOSTNAME)
    revision = serving.write(guest(hostname="web.example.net"))
    reply = await serving.ask(HOSTNAME, revision=revision)
    assert (bytes(reply.body), reply.headers[-1]) == (b"web.example.net", CACHED)
    # A file that looks the same is read again for another revision.
    before, changed = serving.file.stat(), compiled(guest(hostname="wab.example.net"))
    with serving.file.open("r+b") as file:
        file.write(changed.content)
    os.utime(serving.file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert serving.file.stat().st_size == before.st_size
    assert (await serving.ask(HOSTNAME, revision=changed.revision)).body == b"wab.example.net"


def _miss(serving: Serving) -> None:
    serving.file.unlink(missing_ok=True)


def _damage(serving: Serving) -> None:
    serving.file.write_bytes(serving.file.read_bytes()[:-3])


def _keep_no_passwords(serving: Serving) -> None:
    serving.passwords.rmdir()


@pytest.mark.parametrize(
    ("fault", "path", "method", "reason"),
    [
        (_miss, ID, "GET", "its compiled record is missing"),
        (_damage, "/nothing", "GET", "checksum"),
        (_keep_no_passwords, PASSWORD, "POST", "password"),
    ],
)
async def test_a_fault_is_503_and_never_404_and_logged_once_until_it_is_mended(
    serving: Serving, fault: Callable[[Serving], None], path: str, method: str, reason: str
) -> None:
    with structlog.testing.capture_logs() as events:
        for count in (1, 2):
            serving.write()
            fault(serving)
            for _ in range(3):
                reply = await serving.ask(path, method, b"x", revision="0" * 16)
                assert reply.status == 503
                assert reply.headers == ((b"retry-after", b"1"), (b"content-length", b"0"))
            noted = [(one["log_level"], one["instance"]) for one in events]
            assert set(noted) == {("warning", GUEST.id)}
            # A password's file is named after the thread that writes it.
            assert len(noted) == count or method == "POST"
            assert reason in str(events[0]["reason"])
            serving.write()
            serving.passwords.mkdir(exist_ok=True)
            assert (await serving.ask(ID)).status == 200
        # Faults of many instances do not grow for ever.
        for number in range(1100):
            await serving.ask("/", headers=[(INSTANCE[0], b"vm-%d" % number)])
    assert len(serving.service._noted) <= 1024


async def test_user_data_is_exact_and_goes_out_in_pieces(serving: Serving) -> None:
    for data in (b"\x1f\x8b\xff", bytes(range(256)) * 8192):
        serving.write(guest(user_data=data))
        reply = await serving.ask("/latest/user-data")
        assert reply.body == data
        assert (b"content-length", b"%d" % len(data)) in reply.headers
        assert reply.largest <= 256 * 1024
        assert (await serving.ask("/latest/user-data", "HEAD")).body == b""


async def test_a_password_is_kept_once(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    serving.write()
    assert (await serving.ask(PASSWORD)).body == b""
    assert (await serving.ask(PASSWORD, "POST", b"c2Vj", b"", b"cmV0")).status == 200
    assert (await serving.ask(PASSWORD, "POST", b"other")).status == 409
    serving.write(guest(hostname="renamed"))
    assert (await serving.ask(PASSWORD)).body == b"c2VjcmV0"
    # Of two that come at once, too.
    monkeypatch.setattr(PasswordStore, "read", lambda _self, _id: None)
    assert (await serving.ask(PASSWORD, "POST", b"second")).status == 409


@pytest.mark.parametrize(
    "values",
    [
        (),
        (GUEST.id.encode(),) * 2,
        *((value,) for value in (b"", b"../etc/passwd", b"a" * 65, b"-a", b"a\n", b"\xff")),
    ],
)
async def test_no_instance_or_a_bad_one_is_400(serving: Serving, values: tuple[bytes, ...]) -> None:
    serving.write()
    headers = [(b"x-imdsproxy-instance", value) for value in values]
    assert (await serving.ask("/latest", headers=headers)).status == 400
    # But HAProxy's check, which is no document.
    assert (await serving.ask("/livez", headers=headers)).status == (400 if values else 200)
    assert (await serving.ask("/livez")).status == 404


async def test_a_body_is_read_as_far_as_it_is_needed(serving: Serving) -> None:
    serving.write()
    reply = await serving.ask("/latest", "GET", b"x", complete=False)
    assert (reply.status, reply.received) == (200, 0)
    reply = await serving.ask(PASSWORD, "POST", *[b"x" * 10_000] * 100)
    assert reply.status == 413
    assert reply.received <= BODY_LIMIT // 10_000 + 1
    # A client that leaves gets nothing.
    assert (await serving.ask(PASSWORD, "POST", b"a", complete=False)).status == 0


async def test_a_fault_of_ours_is_503_and_logged(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: object, **_keywords: object) -> Answer:
        raise ZeroDivisionError

    serving.write()
    monkeypatch.setattr("imdsproxy.documents.dialects.respond.respond", fail)
    with structlog.testing.capture_logs() as events:
        reply = await serving.ask("/latest")
    assert (reply.status, reply.headers[0]) == (503, (b"retry-after", b"1"))
    assert events[0]["log_level"] == "error"


async def test_a_file_that_ends_early_breaks_the_answer_off_and_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(b"abc")
    file = path.open("rb")
    with pytest.raises(EOFError):
        await send_answer(Answer(200, (), Blob(1, 10)), Reply().take, file)
    assert file.closed


ROOMY = 1 << 30
VM = InstanceId("vm-1")


def file_of(directory: Path, instance_id: InstanceId = GUEST.id) -> Path:
    return directory / compiled_path(instance_id)


def write(directory: Path, name: str, **changes: object) -> InstanceId:
    instance = guest(id=InstanceId(name), **changes)
    write_record(directory, instance)
    return instance.id


def load(reader: RecordReader, instance_id: InstanceId) -> LoadedRecord:
    loaded = reader.load(instance_id)
    assert loaded is not None
    return loaded


def test_a_record_is_written_with_its_directories_and_readable_by_the_group_only(
    tmp_path: Path,
) -> None:
    directory = tmp_path / "documents"
    write_record(directory, GUEST, group=os.getegid())
    path = file_of(directory)
    assert path.read_bytes() == compiled(GUEST).content
    modes = [stat.S_IMODE(one.stat().st_mode) for one in (path, path.parent, directory)]
    assert modes == [0o640, 0o750, 0o750]


def test_a_changed_record_takes_the_old_ones_place(tmp_path: Path) -> None:
    write_record(tmp_path, GUEST)
    before = last_written(file_of(tmp_path))
    write_record(tmp_path, GUEST)
    assert last_written(file_of(tmp_path)) == before
    write_record(tmp_path, guest(hostname="new"))
    assert file_of(tmp_path).read_bytes() == compiled(guest(hostname="new")).content
    # Also one of the right size that was damaged.
    file_of(tmp_path).write_bytes(b"\0" * len(compiled(GUEST).content))
    write_record(tmp_path, GUEST)
    assert file_of(tmp_path).read_bytes() == compiled(GUEST).content
    assert list(file_of(tmp_path).parent.iterdir()) == [file_of(tmp_path)]


@pytest.mark.parametrize(
    ("number", "hint"), [(errno.ENOSPC, "free some space"), (errno.EROFS, "read-only")]
)
def test_a_refusing_file_system_leaves_what_was_there_and_says_who_must_act(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, hint: str
) -> None:
    write_record(tmp_path, GUEST)
    passwords = PasswordStore(tmp_path)

    def refuse(*_args: object, **_keywords: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", refuse)
        with pytest.raises(HostRefused) as refused:
            write_record(tmp_path, guest(hostname="new"))
        assert hint in refused.value.hint
        with pytest.raises(HostRefused) as refused:
            passwords.keep(VM, b"one")
        assert hint in refused.value.hint
    assert file_of(tmp_path).read_bytes() == compiled(GUEST).content
    assert list(file_of(tmp_path).parent.iterdir()) == [file_of(tmp_path)]
    assert passwords.read(VM) is None
    assert passwords.keep(VM, b"one")


def test_all_records_are_listed_and_removed_with_their_passwords(tmp_path: Path) -> None:
    ids = {write(tmp_path, name) for name in ("a", "b.rec", "c-1")}
    (tmp_path / "passwords").mkdir()
    files = DiskFiles(tmp_path, PasswordStore(tmp_path / "passwords"))
    files.passwords.keep(InstanceId("a"), b"one")
    assert set(files.instances()) == ids
    for _ in range(2):
        files.remove(InstanceId("a"))
        assert set(files.instances()) == ids - {InstanceId("a")}
        assert files.passwords.read(InstanceId("a")) is None
    files.directory = tmp_path / "nothing"
    assert list(files.instances()) == []


def test_a_record_that_is_a_directory_is_refused_by_name(tmp_path: Path) -> None:
    file_of(tmp_path).mkdir(parents=True)
    with pytest.raises((HostRefused, PrivilegeMissing), match=str(file_of(tmp_path))):
        RecordReader(tmp_path, ROOMY).load(GUEST.id)


def test_memory_is_bounded_and_the_last_used_stay(tmp_path: Path) -> None:
    ids = [write(tmp_path, f"vm-{number}", user_data=b"x" * 100_000) for number in range(6)]
    reader = RecordReader(tmp_path, 3 * 140_000)
    first = reader.load(ids[0])
    for instance_id in ids[1:3]:
        reader.load(instance_id)
    assert reader.load(ids[0]) is first
    reader.load(ids[3])
    assert reader.load(ids[0]) is first
    assert reader._spent <= 3 * 140_000
    assert set(reader._loaded) == {ids[0], ids[2], ids[3]}
    # One is kept, even if it is too much.
    small = RecordReader(tmp_path, 1)
    assert small.load(ids[0]) is small.load(ids[0])


def test_long_user_data_is_not_held_and_read_only_from_the_same_file(tmp_path: Path) -> None:
    data = os.urandom(1 << 20)
    write(tmp_path, VM, user_data=data)
    reader = RecordReader(tmp_path, ROOMY)
    loaded = load(reader, VM)
    assert loaded.content is None
    assert loaded.cost < 100_000
    blob, file = loaded.tree.record["user_data"], reader.open_content(loaded)
    assert blob is not None
    assert file is not None
    with file:
        file.seek(blob.offset)
        assert file.read(blob.length) == data
    write(tmp_path, VM, user_data=b"y" * (1 << 20))
    assert reader.open_content(loaded) is None
    file_of(tmp_path, VM).unlink()
    assert reader.open_content(loaded) is None


def test_of_many_passwords_at_once_exactly_one_is_kept_for_every_process(tmp_path: Path) -> None:
    kept: list[bytes] = []
    assert PasswordStore(tmp_path).read(VM) is PasswordStore(tmp_path / "none").read(VM) is None

    def post(password: bytes) -> None:
        if PasswordStore(tmp_path).keep(VM, password):
            kept.append(password)

    threads = [
        threading.Thread(target=post, args=(b"s\x00\xff%d" % number * 90,)) for number in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(kept) == 1
    assert PasswordStore(tmp_path).read(VM) == kept[0]
    assert [path.name for path in tmp_path.iterdir()] == [VM]
    assert stat.S_IMODE((tmp_path / VM).stat().st_mode) == 0o640
    # A removed one may be set again.
    assert PasswordStore(tmp_path).remove(VM)
    assert not PasswordStore(tmp_path).remove(VM)
    assert PasswordStore(tmp_path).keep(VM, b"two")
