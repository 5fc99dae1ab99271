from __future__ import annotations

import errno
import os
import stat
import threading
import tracemalloc
from pathlib import Path

import pytest

from imdsproxy.core.compiled import compiled_path
from imdsproxy.core.model import InstanceId
from imdsproxy.errors import HostRefused, PrivilegeMissing
from imdsproxy.serving import store
from imdsproxy.serving.store import DiskFiles, LoadedRecord, PasswordStore, RecordReader
from support.guest_records import GUEST, compiled, guest
from support.record_files import write_record

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
    before = file_of(tmp_path).stat()
    write_record(tmp_path, GUEST)
    assert file_of(tmp_path).stat() == before
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


def test_a_parsed_record_costs_about_what_is_reckoned(tmp_path: Path) -> None:
    ids = [write(tmp_path, f"vm-{number}") for number in range(50)]
    reader = RecordReader(tmp_path, ROOMY)
    tracemalloc.start()
    try:
        for instance_id in ids:
            loaded = load(reader, instance_id)
            for path in (("latest", "meta-data"), ("openstack", "latest"), ("nocloud",)):
                assert loaded.tree.find(path) is not None
        used = tracemalloc.get_traced_memory()[0] / len(ids)
    finally:
        tracemalloc.stop()
    assert used < store._TREE_COST


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
