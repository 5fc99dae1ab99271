"""Short documents are kept by HAProxy itself, beside its cache: which, for whom, and how many."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Final

import pytest

from support.haproxy_alone import Alone, Document, open_alone

pytestmark = pytest.mark.root

_LEAF: Final = "/latest/meta-data/instance-id"
_PAST_THE_CACHE: Final = ("Cache-Control: no-cache",)
"""HAProxy's cache does not answer that: what is answered without the document server is kept beside it."""


@pytest.fixture(scope="module")
def opened() -> Iterator[Alone]:
    with open_alone() as alone:
        yield alone


@pytest.fixture
def alone(opened: Alone) -> Alone:
    opened.renew()
    return opened


def _kept(alone: Alone, path: str) -> bool:
    """Whether the second read is answered, past the cache, without the document server."""
    alone.ask(path, kept=False)
    before = len(alone.documents.asked)
    alone.ask(path, headers=_PAST_THE_CACHE, kept=False)
    return len(alone.documents.asked) == before


def test_a_short_line_below_latest_is_kept_and_comes_as_it_came_at_first(alone: Alone) -> None:
    first = alone.ask(_LEAF)
    assert _kept(alone, _LEAF)
    again = alone.ask(_LEAF, headers=_PAST_THE_CACHE)
    assert (again.status, again.body) == (first.status, first.body) == (200, b"i-0123")
    assert (
        again.headers
        == first.headers
        == {
            "content-type": Document().content_type,
            "content-length": "6",
        }
    )
    head = alone.ask(_LEAF, method="HEAD", headers=_PAST_THE_CACHE)
    assert (head.headers, head.body) == (first.headers, b"")
    assert alone.documents.asked.count(_LEAF) == 1


@pytest.mark.parametrize(
    "document",
    [
        Document(lifetime=False),
        Document(status="404 Not Found"),
        Document(content_type="application/octet-stream"),
        Document(body=b""),
        Document(body=b"two\nlines"),
        Document(body=b"its end\n"),
        Document(body="umläut".encode()),
        Document(body=b"nul\0"),
        Document(body=b"x" * 257),
    ],
    ids=str,
)
def test_what_haproxy_could_not_give_back_as_it_was_is_not_kept(
    alone: Alone, document: Document
) -> None:
    alone.documents.document = document
    assert not _kept(alone, _LEAF)


@pytest.mark.parametrize(
    "path",
    [
        "/2009-04-04/meta-data/instance-id",
        "/latest//meta-data",
        "/latest/meta-data/",
        "/latest/%61",
        "/latest/../x",
    ],
)
def test_only_one_spelling_of_a_path_is_kept(alone: Alone, path: str) -> None:
    assert not _kept(alone, path)


def test_other_methods_and_tokens_are_not_answered_by_what_is_kept(alone: Alone) -> None:
    assert _kept(alone, _LEAF)
    told, record = len(alone.documents.asked), alone.records["red"]
    assert alone.ask(_LEAF, headers=("X-aws-ec2-metadata-token: x",)).status == 401
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        alone.ask(_LEAF, method=method)
    assert len(alone.documents.asked) == told + 4
    alone.write("red", f"+1trrr--b:::64|{record}")
    assert alone.ask(_LEAF).status == 401
    alone.write("red", f"+0tooo---:::64|{record}")
    assert alone.ask(_LEAF).status == 403
    alone.write("red", f"+1tooog--:::64|{record}")
    assert alone.ask(_LEAF, headers=("Via: 1.1 x",)).status == 403
    alone.write("red", "!")
    assert alone.ask(_LEAF).status == 503


@pytest.mark.parametrize(
    ("word", "revision"), [("", "a"), ("+1tooo---::0:64|", "b"), ("+1-ooo---::0:64|", "c")]
)
def test_a_kept_connection_gets_what_is_kept_for_whom_it_is_now(
    alone: Alone, word: str, revision: str
) -> None:
    alone.documents.document = Document(b"OWN")
    with alone.connect() as connection:
        for number in range(6):
            name = f"i-{number % 2}"
            alone.write("red", f"{word}{name}|{revision}")
            for _ in range(3):
                assert connection.request(_LEAF).text == name
    assert alone.documents.asked.count(_LEAF) == 2
    alone.documents.document = Document(b"new")
    alone.write("red", f"{word}i-1|{revision}2")
    assert alone.ask(_LEAF).text == "new"


def test_no_path_reads_what_is_kept_for_somebody_else(alone: Alone) -> None:
    alone.documents.document = Document(b"OWN")
    assert alone.ask(_LEAF).text == "i-red"
    record = alone.records["red"]
    for path in (
        _LEAF,
        f"{_LEAF}|{record}",
        f"{_LEAF}|{record}|",
        f"{_LEAF}?|{record}",
        "0",
        "/0",
        "/12",
    ):
        for _ in range(2):
            reply = alone.ask(path, "green", kept=False)
            assert reply.status == 400 or reply.text == "i-green", path


def test_a_body_on_a_read_is_not_taken_for_the_next_request(alone: Alone) -> None:
    assert _kept(alone, _LEAF)
    told = len(alone.documents.asked)
    with alone.connect() as connection:
        smuggled = b"GET /latest/smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
        connection.request(_LEAF, body=smuggled)
        time.sleep(0.05)
        connection.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            assert connection.socket.recv(1) == b""
    assert len(alone.documents.asked) == told


def test_what_is_kept_has_bounds_however_much_is_read(alone: Alone) -> None:
    with alone.connect() as connection:
        for number in range(1500):
            assert connection.request(f"/latest/x{number}").status == 200
    lines = alone.command(f"show map {alone.directory}/short.map").split()[1::3]
    documents = [line for line in lines if line.startswith("/")]
    assert 128 < len(documents) <= 256
    assert len(lines) <= 512
