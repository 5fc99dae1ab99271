"""Whatever bytes a guest sends: it is answered, reads nobody else's document, and Nova sees none of its headers.

In front of our own documents by HAProxy's real rules alone; with a daemon in front of a recorder in Nova's place, which
takes nothing that is not signed.
"""

from __future__ import annotations

import contextlib
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import pytest
from hypothesis import given, settings

from support.forgeries import OTHER_ADDRESS, OTHER_INSTANCE, OTHER_PROJECT
from support.guest import Connection, Lost, take_token
from support.haproxy_alone import Alone, Document, open_alone
from support.hostile import HARMFUL, Harm, harms
from support.nova_world import NovaWorld, open_nova_world
from support.recorder import Answer, Received, reply

pytestmark = pytest.mark.root

_WITHIN_S: Final = 5.0
_PASSES: Final = re.compile(
    rb"accept|connection|content-(?:length|type)|host|if-[a-z-]+|range|user-agent"
    rb"|x-instance-id|x-instance-id-signature|x-tenant-id|x-forwarded-for"
)
"""Names of headers that Nova may see; what those say that a guest has no say in is looked at one by one."""

_FOREIGN: Final = tuple(one.encode() for one in (OTHER_INSTANCE, OTHER_PROJECT, OTHER_ADDRESS))
_CHOSEN: Final = (b"accept", b"if-", b"user-agent", b"content-type", b"range")
"""What a guest may say whatever it likes in: nobody believes it."""

_EXAMPLES: Final = settings(max_examples=400, derandomize=True, deadline=None, database=None)


def _send(connection: Connection, data: bytes) -> bytes | None:
    """All that comes back when a guest sends this and then no more; `None` where nobody ends it."""
    parts = []
    deadline = time.monotonic() + _WITHIN_S
    with connection:
        connection.socket.settimeout(_WITHIN_S)
        # It may be refused before it has said all; what it was told is there all the same.
        with contextlib.suppress(Lost):
            connection.send(data)
        with contextlib.suppress(OSError):
            connection.socket.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            while time.monotonic() < deadline:
                try:
                    more = connection.socket.recv(262_144)
                except TimeoutError:
                    return None
                if not more:
                    break
                parts.append(more)
    return b"".join(parts)


def _unanswered(harm: Harm, got: bytes | None) -> list[str]:
    if got is None:
        return [f"no end within {_WITHIN_S} s"]
    if got and not got.startswith(b"HTTP/1."):
        return [f"{got[:60]!r}"]
    if harm.whole and not got:
        return ["no answer"]
    # 502 and 504 would be taken for good by cloud-init, 500 is a fault of ours.
    status = got[9:12]
    return [f"status {status.decode()}"] if status in (b"500", b"502", b"504") else []


# In front of our own documents


@pytest.fixture(scope="module")
def documents() -> Iterator[tuple[Alone, str]]:
    with open_alone() as alone:
        alone.renew()
        alone.documents.document = Document(b"document of OWN")
        yield alone, alone.token("green", expires_at=int(time.time()) + 20_000)


def _harm_to_documents(alone: Alone, token: str, harm: Harm) -> list[str]:
    """What is wrong after one guest and then another of the same address have sent this."""
    wrong = []
    for name in ("green", "red"):
        # What a request before is behind with comes at a revision that is none any more.
        before = [record.rpartition("|")[2].encode() for record in alone.records.values()]
        for network in alone.ports:
            alone.put(network)
        alone.documents.heads = []
        instance, revision = alone.records[name].split("|")
        who = {"address": "127.0.0.1", "instance": instance, "network": name, "revision": revision}
        identity = {f"x-imdsproxy-{key}: {value}".encode() for key, value in who.items()}
        got = _send(alone.connect(name), harm.data_with(token))
        wrong += _unanswered(harm, got)
        if got and re.search(rb"document of (?!i-%s)" % name.encode(), got):
            wrong.append(f"somebody else's: {got!r}")
        for head in alone.documents.heads:
            told = {one.lower() for one in head.split(b"\r\n")[1:] if b"imdsproxy" in one.lower()}
            late = any(b"x-imdsproxy-revision: " + one in told for one in before)
            if told != identity and not late:
                wrong.append(f"{name}: {head!r}")
    return wrong


def test_no_hand_written_harm_reads_anothers_documents(documents: tuple[Alone, str]) -> None:
    found = {one.data: wrong for one in HARMFUL if (wrong := _harm_to_documents(*documents, one))}
    assert not found
    alone, _ = documents
    assert alone.ask("/latest/user-data").text == "document of i-red"


@_EXAMPLES
@given(harm=harms())
def test_no_harm_reads_anothers_documents(documents: tuple[Alone, str], harm: Harm) -> None:
    assert not _harm_to_documents(*documents, harm)


# In front of Nova


_IDLE_S: Final = 10.0


@dataclass(slots=True)
class _Nova:
    """A world with Nova's recorder, and a guest beside the one that means harm."""

    world: NovaWorld
    token: str
    other: Connection
    heard: float = field(default_factory=time.monotonic)
    asked: int = field(default=0)
    seen: int = field(default=0)

    def harm(self, harm: Harm) -> list[str]:
        """What is wrong after a guest has sent this."""
        nova = self.world.nova
        nova.forget()
        nova.default = _who
        got = _send(self.world.red.connect(), harm.data_with(self.token))
        wrong = _unanswered(harm, got)
        self.seen += len(nova.heads)
        wrong += [f"fragment {one!r}" for one in nova.fragments]
        for head in nova.heads:
            wrong += self._seen(head)
        wrong += [f"trailers {one.trailers}" for one in nova.requests if one.trailers]
        if got and OTHER_INSTANCE.encode() in got:
            wrong.append(f"somebody else's: {got!r}")
        self.asked += 1
        if self.asked % 20 == 0:
            wrong += self._unharmed()
        return wrong

    def _seen(self, head: Received) -> list[str]:
        """What Nova must not have seen of a request."""
        wrong = []
        # The target of a request in absolute form would say for whom it is.
        if not head.target.startswith(b"/") and head.target != b"*":
            wrong.append(f"target {head.target!r}")
        identity = {**self.world.identity("red"), b"host": self.world.nova.authority.encode()}
        for name, value in identity.items():
            if head.values(name.decode()) != (value,):
                wrong.append(f"{name!r} {head.values(name.decode())}")
        for name, value in head.headers:
            free = name.lower().startswith(_CHOSEN)
            foreign = not free and any(one in value for one in _FOREIGN)
            if foreign or not _PASSES.fullmatch(name.lower()):
                wrong.append(f"{name!r}: {value!r}")
        return wrong

    def _unharmed(self) -> list[str]:
        if time.monotonic() - self.heard > _IDLE_S:
            # On a busy machine twenty harms may take longer than HAProxy keeps a connection that asks nothing.
            self.other.close()
            self.other = self.world.green.connect()
        got = self.other.request("/latest/user-data")
        self.heard = time.monotonic()
        return [] if (got.status, got.text) == (200, OTHER_INSTANCE) else [f"the other one: {got}"]


def _who(request: Received) -> Answer:
    """Whom Nova takes the request to be of."""
    body = request.values("x-instance-id")[0]
    return reply(body, with_body=request.method != "HEAD")


@pytest.fixture(scope="module")
def nova() -> Iterator[_Nova]:
    with open_nova_world() as world:
        made = _Nova(world, take_token(world.green), world.green.connect())
        yield made
        made.other.close()
        # Else nothing would have been tried.
        assert made.seen >= made.asked // 4


@_EXAMPLES
@given(harm=harms())
def test_nova_sees_no_harm(nova: _Nova, harm: Harm) -> None:
    assert not nova.harm(harm)


@pytest.mark.parametrize("framing", ["", "Transfer-Encoding: chunked\r\n"])
def test_a_large_head_is_taken_or_refused_and_never_a_fault_of_ours(
    nova: _Nova, framing: str
) -> None:
    """What comes in chunks goes by way of the resolver."""
    lines: Mapping[str, Callable[[int], str]] = {
        "target": lambda size: f"GET /{'a' * size} HTTP/1.1\r\n",
        "header": lambda size: f"GET / HTTP/1.1\r\nAccept: {'b' * size}\r\n",
        "headers": lambda size: (
            "GET / HTTP/1.1\r\n"
            + "".join(f"If-{one}: {'c' * (size // 90)}\r\n" for one in range(90))
        ),
    }
    body = "0\r\n\r\n" if framing else ""
    found = {}
    for name, line in lines.items():
        for size in (3_000, 7_000, 7_400, 7_800, 8_200, 10_000, 12_000, 15_000, 15_300, 17_000):
            data = f"{line(size)}Host: x\r\n{framing}\r\n{body}"
            status = nova.world.red.raw(data.encode()).status
            if status not in {200, 400, 414, 431} or (size <= 7_000 and status != 200):
                found[name, size] = status
    assert not found
