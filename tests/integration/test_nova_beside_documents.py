"""Instances with documents of ours on a host that is in front of Nova too: the cache stands elsewhere there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import pytest

from support.haproxy_alone import Alone, Document, open_alone

pytestmark = pytest.mark.root

_PATH: Final = "/latest/user-data"
_TARGETS: Final = tuple(
    f"{start}{_PATH}{query}"
    for start in ("", "http://169.254.169.254")
    for query in ("", "?", "?x=1")
)


@pytest.fixture(scope="module")
def opened() -> Iterator[Alone]:
    with open_alone(nova=True) as alone:
        yield alone


@pytest.fixture
def alone(opened: Alone) -> Iterator[Alone]:
    """Its guest `red` is of Nova, and `green` has documents of ours."""
    opened.renew()
    opened.documents.document = Document(b"OWN" + b"x" * 4000)
    opened.nova = False
    opened.put("green")
    yield opened
    opened.nova = True


def _asked(alone: Alone, header: bytes) -> int:
    return sum(header in head.lower() for head in alone.documents.heads)


def _ask_both(alone: Alone) -> None:
    for target in _TARGETS:
        for network in ("red", "green"):
            reply = alone.ask(target, network)
            assert (reply.status, reply.text.rstrip("x")) == (200, f"i-{network}"), target
            if network == "green":
                assert not {"cache-control", "age"} & set(reply.headers)


def test_a_guest_of_novas_and_one_with_documents_read_each_their_own(alone: Alone) -> None:
    _ask_both(alone)
    cached = _asked(alone, b"x-imdsproxy-instance: i-green")
    _ask_both(alone)
    # Nova is asked each time, and for no other guest.
    assert _asked(alone, b"x-instance-id: i-red") == 2 * len(_TARGETS)
    assert _asked(alone, b"x-instance-id: ") == 2 * len(_TARGETS)
    assert _asked(alone, b"x-imdsproxy-instance: i-green") == cached < len(_TARGETS)


def test_no_request_reads_what_another_instance_left_in_the_cache(alone: Alone) -> None:
    alone.put("red")
    for _ in range(2):
        _ask_both(alone)
    for record in alone.records.values():
        for target in (f"/{record}{_PATH}", f"http://{record}/{record}{_PATH}"):
            for network in ("red", "green"):
                reply = alone.ask(target, network, kept=False)
                own = reply.text.rstrip("x") == f"i-{network}"
                assert reply.status in (400, 404) or own, target
