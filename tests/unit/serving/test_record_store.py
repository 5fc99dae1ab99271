from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from imdsproxy.core.compiled import compiled_path
from imdsproxy.core.model import InstanceId
from imdsproxy.errors import HostRefused, PrivilegeMissing
from imdsproxy.serving import store
from imdsproxy.serving.store import (
    RecordReader,
    apply_record,
    list_records,
    remove_record,
)
from support.guest_records import GUEST, compiled, guest

ROOMY = 1 << 30


def file_of(directory: Path, instance_id: InstanceId = GUEST.id) -> Path:
    return directory / compiled_path(instance_id)


def write(directory: Path, name: str, **changes: object) -> InstanceId:
    instance = guest(id=InstanceId(name), **changes)
    apply_record(directory, instance.id, compiled(instance))
    return instance.id


def test_a_record_is_written_with_its_directories_and_readable_by_the_group_only(
    tmp_path: Path,
) -> None:
    directory = tmp_path / "documents"
    assert apply_record(directory, GUEST.id, compiled(GUEST), group=os.getegid())
    path = file_of(directory)
    assert path.read_bytes() == compiled(GUEST).content
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o750
    assert stat.S_IMODE(directory.stat().st_mode) == 0o750


def test_a_changed_record_takes_the_old_ones_place(tmp_path: Path) -> None:
    apply_record(tmp_path, GUEST.id, compiled(GUEST))
    before = file_of(tmp_path).stat()
    assert not apply_record(tmp_path, GUEST.id, compiled(GUEST))
    assert file_of(tmp_path).stat() == before
    assert apply_record(tmp_path, GUEST.id, compiled(guest(hostname="new")))
    assert file_of(tmp_path).read_bytes() == compiled(guest(hostname="new")).content
    # Also one of the right size that was damaged.
    file_of(tmp_path).write_bytes(b"\0" * len(compiled(GUEST).content))
    assert apply_record(tmp_path, GUEST.id, compiled(GUEST))
    assert file_of(tmp_path).read_bytes() == compiled(GUEST).content
    assert list(file_of(tmp_path).parent.iterdir()) == [file_of(tmp_path)]


@pytest.mark.parametrize(("number", "hint"), [(errno.ENOSPC, "full"), (errno.EROFS, "read-only")])
def test_a_refusing_file_system_leaves_the_old_record_and_says_who_must_act(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, hint: str
) -> None:
    apply_record(tmp_path, GUEST.id, compiled(GUEST))

    def refuse(*_args: object, **_keywords: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", refuse)
        with pytest.raises(HostRefused) as refused:
            apply_record(tmp_path, GUEST.id, compiled(guest(hostname="new")))
    assert hint in refused.value.hint
    assert file_of(tmp_path).read_bytes() == compiled(GUEST).content
    assert list(file_of(tmp_path).parent.iterdir()) == [file_of(tmp_path)]


def test_all_records_are_listed(tmp_path: Path) -> None:
    ids = {write(tmp_path, name) for name in ("a", "b.rec", "c-1")}
    assert set(list_records(tmp_path)) == ids
    assert remove_record(tmp_path, InstanceId("a"))
    assert not remove_record(tmp_path, InstanceId("a"))
    assert set(list_records(tmp_path)) == ids - {InstanceId("a")}
    assert list(list_records(tmp_path / "nothing")) == []


def test_a_loaded_record_is_kept_while_its_file_is_the_same(tmp_path: Path) -> None:
    apply_record(tmp_path, GUEST.id, compiled(GUEST))
    reader = RecordReader(tmp_path, capacity=ROOMY)
    first = reader.load(GUEST.id)
    assert first is not None
    assert reader.load(GUEST.id) is first
    assert reader.load(GUEST.id, fresh=True) is not first


def test_a_record_that_is_a_directory_is_refused_by_name(tmp_path: Path) -> None:
    file_of(tmp_path).mkdir(parents=True)
    with pytest.raises((HostRefused, PrivilegeMissing), match=str(file_of(tmp_path))):
        RecordReader(tmp_path, capacity=ROOMY).load(GUEST.id)


def test_memory_is_bounded_and_the_last_used_stay(tmp_path: Path) -> None:
    ids = [write(tmp_path, f"vm-{number}", user_data=b"x" * 100_000) for number in range(6)]
    reader = RecordReader(tmp_path, capacity=3 * 140_000)
    first = reader.load(ids[0])
    for instance_id in ids[1:3]:
        reader.load(instance_id)
    assert reader.load(ids[0]) is first
    reader.load(ids[3])
    assert reader.load(ids[0]) is first
    assert len(reader._loaded) <= 3
    assert reader._spent <= 3 * 140_000
    assert set(reader._loaded) == {ids[0], ids[2], ids[3]}
    # One is kept, even if it is too much.
    small = RecordReader(tmp_path, capacity=1)
    assert small.load(ids[0]) is small.load(ids[0])


def test_long_user_data_is_not_held_in_memory(tmp_path: Path) -> None:
    data = os.urandom(1 << 20)
    instance_id = write(tmp_path, "vm", user_data=data)
    reader = RecordReader(tmp_path, capacity=ROOMY)
    loaded = reader.load(instance_id)
    assert loaded is not None
    assert loaded.content is None
    assert loaded.cost < 100_000
    blob = loaded.tree.record["user_data"]
    assert blob is not None
    file = reader.open_content(loaded)
    assert file is not None
    with file:
        file.seek(blob.offset)
        assert file.read(blob.length) == data


def test_content_that_was_replaced_or_removed_is_not_opened(tmp_path: Path) -> None:
    instance_id = write(tmp_path, "vm", user_data=b"x" * (1 << 20))
    reader = RecordReader(tmp_path, capacity=ROOMY)
    loaded = reader.load(instance_id)
    assert loaded is not None
    write(tmp_path, "vm", user_data=b"y" * (1 << 20))
    assert reader.open_content(loaded) is None
    remove_record(tmp_path, instance_id)
    assert reader.open_content(loaded) is None


def test_a_parsed_record_costs_about_what_is_reckoned(tmp_path: Path) -> None:
    import tracemalloc  # noqa: PLC0415 - only this test pays for it

    ids = [write(tmp_path, f"vm-{number}") for number in range(50)]
    reader = RecordReader(tmp_path, capacity=ROOMY)
    tracemalloc.start()
    try:
        for instance_id in ids:
            loaded = reader.load(instance_id)
            assert loaded is not None
            for path in (("latest", "meta-data"), ("openstack", "latest"), ("nocloud",)):
                assert loaded.tree.find(path) is not None
        used = tracemalloc.get_traced_memory()[0] / len(ids)
    finally:
        tracemalloc.stop()
    assert used < store._TREE_COST
