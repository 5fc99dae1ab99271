from __future__ import annotations

import pytest

from imdsproxy.core.documents.tree import BadPath, parse_path


@pytest.mark.parametrize(
    ("path", "names"),
    [
        (b"/", ()),
        (b"", ()),
        (b"///", ()),
        (b"/latest", ("latest",)),
        (b"/latest/", ("latest",)),
        (b"//latest///meta-data//", ("latest", "meta-data")),
        (b"/latest/./meta-data/.", ("latest", "meta-data")),
        (b"/latest/meta-data/../user-data", ("latest", "user-data")),
        (b"/latest/meta-data/..", ("latest",)),
        (b"/latest/api/%74oken", ("latest", "api", "token")),
        (b"/latest/%2e%2E", None),
        (b"/latest/x/%2e./user-data", ("latest", "user-data")),
        (b"/a%2fb", ("a/b",)),
        (b"/a%25%32%66b", ("a%2fb",)),
        (b"/...", ("...",)),
        (b"/.x", (".x",)),
        (b"/a+b", ("a+b",)),
        ("/ä".encode(), ("ä",)),
        (b"/\xff", ("\udcff",)),
    ],
)
def test_a_path_is_read_as_names(path: bytes, names: tuple[str, ...] | None) -> None:
    assert parse_path(path) == names


@pytest.mark.parametrize(
    "path",
    [b"/..", b"/../latest", b"/latest/..", b"/openstack/../latest", b"/./..", b"/a/../../b"],
)
def test_dot_segments_do_not_leave_their_tree(path: bytes) -> None:
    assert parse_path(path) is None


@pytest.mark.parametrize("path", [b"/%", b"/a%2", b"/%zz", b"/a%2/b", b"/%4"])
def test_a_broken_escape_is_a_bad_path(path: bytes) -> None:
    assert parse_path(path) == BadPath()
