from __future__ import annotations

import os
from pathlib import Path

from imdsproxy.core.records import MAX_PAYLOAD, Unreadable
from imdsproxy.sources.file.record_file import decode_records, payload_reader

GOOD = "instances:\n- id: a\n  name: a\n"


def test_a_file_that_is_no_utf8_is_reported_with_its_line() -> None:
    records, _ = decode_records(b"# fine\n# fine\n# \xe4\n", file="x.yaml")
    assert [str(problem) for problem in records.problems] == [
        "x.yaml:3: file: is not UTF-8: byte 0xe4 (save it as UTF-8; binary goes as !!binary)"
    ]


def test_a_byte_order_mark_is_no_content() -> None:
    records, _ = decode_records(b"\xef\xbb\xbf" + GOOD.encode(), file="x.yaml")
    assert len(records.instances) == 1


def test_the_name_decides_between_yaml_and_json() -> None:
    assert decode_records(GOOD.encode(), file="x.yml")[0].instances
    assert decode_records(GOOD.encode(), file="x.json")[0].problems


def test_problems_have_file_line_and_field() -> None:
    text = (
        "instances:\n- id: a\n  name: a\n  ports:\n  - network: n\n    addresses:\n    - 10.0.0\n"
    )
    records, _ = decode_records(text.encode(), file="x.yaml")
    assert str(records.all_problems[0]).startswith("x.yaml:7: instances[0].ports[0].addresses[0]: ")


def test_a_payload_is_read_beside_the_record_file_or_by_its_whole_path(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"\x00\xff")
    read = payload_reader(tmp_path)
    assert read("data") == b"\x00\xff"
    assert read(str(tmp_path / "data")) == b"\x00\xff"


def test_a_payload_that_is_missing_large_or_no_file_is_reported(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "directory").mkdir()
    with (tmp_path / "large").open("wb") as stream:
        stream.truncate(MAX_PAYLOAD + 1)
    read = payload_reader(tmp_path)
    for name in ("missing", "fifo", "directory", "large", "large/x", "x" * 300):
        found = read(name)
        assert isinstance(found, Unreadable), name
        assert found.reason
