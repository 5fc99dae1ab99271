from __future__ import annotations

import pytest

from imdsproxy.core.documents.tree import vendor_object, vendor_text

CONFIG = b"#cloud-config\nruncmd: [date]\n"


@pytest.mark.parametrize("data", [None, b""])
def test_none_is_an_empty_object_and_an_empty_file(data: bytes | None) -> None:
    assert vendor_object(data) == {}
    assert vendor_text(data) == b""


@pytest.mark.parametrize("data", [CONFIG, b"[1, 2]", b'"text"', b"{broken", b"[" * 100_000])
def test_text_is_for_cloud_init(data: bytes) -> None:
    assert vendor_object(data) == {"cloud-init": data.decode()}
    assert vendor_text(data) == data


def test_an_object_is_openstacks_own_and_its_member_is_run() -> None:
    data = b'{"cloud-init": "#!/bin/sh\\n", "region": "lab"}'
    assert vendor_object(data) == {"cloud-init": "#!/bin/sh\n", "region": "lab"}
    assert vendor_text(data) == b"#!/bin/sh\n"


def test_an_object_without_the_member_runs_nothing() -> None:
    assert vendor_object(b'{"region": "lab"}') == {"region": "lab"}
    assert vendor_text(b'{"region": "lab"}') == b""


def test_several_texts_become_an_archive() -> None:
    data = b'{"cloud-init": ["#!/bin/sh\\n", "#cloud-config\\n{}"]}'
    assert vendor_text(data) == b'#cloud-config-archive\n["#!/bin/sh\\n", "#cloud-config\\n{}"]'


def test_bytes_that_are_no_text_are_for_nocloud_alone() -> None:
    assert vendor_object(b"\x1f\x8b\xff") == {}
    assert vendor_text(b"\x1f\x8b\xff") == b"\x1f\x8b\xff"
