"""Whatever a guest sends: it is answered, reads no other document and no secret, and Nova sees none of its headers.

In front of our own documents by HAProxy's real rules alone; with a daemon in front of a recorder in Nova's place, which
takes nothing that is not signed.
"""

import contextlib
import json
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given, settings

from imdsproxy.model.tokens import parse_token_keys
from imdsproxy.model.wire import HEADER_TURN
from support.forgeries import OTHER_ADDRESS, OTHER_INSTANCE, OTHER_PROJECT
from support.guest import Connection, Lost, take_token, with_token
from support.haproxy_alone import Alone, Document, open_alone
from support.health import METRICS, ask_operator
from support.hostile import HARMFUL, Harm, harms
from support.nova_world import INSTANCES, SECRET, NovaWorld, open_nova_world
from support.recorder import Answer, Received, reply, signature_of

pytestmark = pytest.mark.root

_UNITS: Final = Path(__file__).parents[2] / "packaging" / "systemd"
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


_TURN: Final = HEADER_TURN.encode() + rb": \d"
_REVISION: Final = re.compile(rb"(?i)\r\nx-imdsproxy-revision: ([0-9a-f]{8})(?:\r\n|$)")


def _identity(network: str, revision: bytes) -> set[bytes]:
    """What the document server gets with a request of the network's guest."""
    who = {"address": "127.0.0.1", "instance": f"i-{network}", "network": network}
    headers = {f"x-imdsproxy-{key}: {value}".encode() for key, value in who.items()}
    return headers | {b"x-imdsproxy-revision: " + revision}


def _harm_to_documents(alone: Alone, token: str, harm: Harm) -> list[str]:
    """What is wrong after one guest and then another of the same address have sent this."""
    wrong = []
    for name in ("green", "red"):
        for network in alone.ports:
            alone.put(network)
        now = {key: one.partition("|")[2].encode() for key, one in alone.records.items()}
        alone.documents.heads = []
        got = _send(alone.connect(name), harm.data_with(token))
        wrong += _unanswered(harm, got)
        if got and re.search(rb"document of (?!i-%s)" % name.encode(), got):
            wrong.append(f"somebody else's: {got!r}")
        for head in alone.documents.heads:
            told = {one.lower() for one in head.split(b"\r\n")[1:] if b"imdsproxy" in one.lower()}
            # Which worker was tried first is HAProxy's word to itself.
            told = {one for one in told if not re.fullmatch(_TURN, one)}
            expected = [_identity(name, now[name])]
            # What an earlier request is behind with has a revision that is none any more.
            found = _REVISION.search(head)
            if found is not None and found[1] not in now.values():
                expected = [_identity(network, found[1]) for network in alone.ports]
            if told not in expected:
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
def world() -> Iterator[NovaWorld]:
    with open_nova_world() as world:
        world.daemon.configure({**world.daemon.settings, "metrics": METRICS})
        # What listens is not changed while it runs.
        world.daemon.kill_controller()
        world.daemon.start()
        yield world


@pytest.fixture(scope="module")
def nova(world: NovaWorld) -> Iterator[_Nova]:
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


# What opens something is not where it need not be: tokens, their keys, Nova's secret, signatures


def _asked(world: NovaWorld) -> list[str]:
    """Every token that was seen, after all of the ways in which a guest can use one, rightly and wrongly."""
    tokens = []
    for guest in world.guests.values():
        token = take_token(guest)
        tokens.append(token)
        for sent in (token, token + "x", f"{token}, {token}", token.upper()):
            (header,) = with_token(sent)
            guest.ask("/latest/user-data", headers=(header,))
            guest.ask("/latest/user-data", headers=(header, header))
            head = f"POST /nonsense HTTP/1.1\r\nHost: x\r\n{header}\r\n"
            guest.raw(f"{head}Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n".encode())
            guest.raw(f"GET / HTTP/1.1\r\nHost: x\r\n{header}\r\n broken \0\r\n\r\n".encode())
    return tokens


def _secrets(world: NovaWorld, tokens: list[str]) -> Mapping[str, list[bytes]]:
    keys = parse_token_keys((world.daemon.state / "token-keys").read_text())
    return {
        "token": [word.encode() for token in tokens for word in (token, token.split(".")[2])],
        "key": [word for key in keys for word in (key.text.encode(), key.secret, key.secret.hex().encode())],
        "secret": [SECRET.encode()],
        "signature": [signature_of(SECRET, one).encode() for one in INSTANCES.values()],
    }  # fmt: skip


def _found(secrets: Mapping[str, list[bytes]], content: bytes) -> set[str]:
    return {name for name, words in secrets.items() if any(word in content for word in words)}


def _provoke(world: NovaWorld) -> None:
    """Errors of which each tells what it was about."""
    daemon = world.daemon
    assert daemon.command("reload").status == 0
    settings = daemon.settings
    for broken in ({"nova": {"nonsense": SECRET[:3]}}, {"tokens": {"key_file": "/nonexistent"}}):
        daemon.configure({**settings, **broken})
        daemon.command("reload")
    daemon.configure(settings)
    key_file = daemon.state / "token-keys"
    kept = key_file.read_text()
    key_file.write_text(f"{kept}broken {kept.splitlines()[-1]}\n")
    daemon.command("reload")
    key_file.write_text(kept)
    assert daemon.command("reload").status == 0


def _is_roots(path: Path, *, only: bool) -> bool:
    """Whether root alone can read a file, or at most root's group."""
    told = path.stat()
    return (told.st_uid, told.st_gid) == (0, 0) and told.st_mode & 0o777 in (
        (0o600,) if only else (0o600, 0o640)
    )


def test_what_opens_something_is_in_its_own_files_only(world: NovaWorld) -> None:
    daemon = world.daemon
    tokens = _asked(world)
    secrets = _secrets(world, tokens)
    _provoke(world)
    allowed = {
        daemon.state / "token-keys": {"key"},
        daemon.runtime / "token-keys.map": {"key"},
        daemon.directory / "secret": {"secret"},
        # The record says how to ask Nova for an instance.
        daemon.runtime / "base.map": {"signature"},
        daemon.runtime / "overlay.map": {"signature"},
    }
    wrong = {}
    for path in daemon.directory.rglob("*"):
        if path.is_file() and not path.is_symlink():
            found = _found(secrets, path.read_bytes())
            if found - allowed.get(path, set()):
                wrong[str(path.name)] = found
            if found and not _is_roots(path, only=found != {"signature"}):
                wrong[str(path.name)] = {oct(path.stat().st_mode)}
    assert not wrong


def test_what_opens_something_is_told_to_nobody_who_asks_how_things_are(world: NovaWorld) -> None:
    secrets = _secrets(world, _asked(world))
    daemon = world.daemon
    told = {
        "status": json.dumps(daemon.status()),
        "metrics": ask_operator(world.lab, "/metrics").text,
    }
    assert "imdsproxy" in told["metrics"]
    for network in INSTANCES:
        told[f"explain {network}"] = json.dumps(daemon.explain(network, "10.0.0.5"))
    for words in (("status",), ("config", "show"), ("render",), ("check",), ("instance", "list"),
                  ("instance", "show", INSTANCES["red"])):  # fmt: skip
        done = daemon.command(*words)
        assert "there is no command" not in done.err, done
        told[" ".join(words)] = done.out + done.err
    assert not {
        name: found for name, text in told.items() if (found := _found(secrets, text.encode()))
    }


def test_no_process_has_what_opens_something_in_its_words_or_leaves_its_memory_behind(
    world: NovaWorld,
) -> None:
    """Neither now nor by a soft limit on the size of core files that somebody raises."""
    secrets = _secrets(world, _asked(world))
    processes = world.daemon.processes()
    assert len(processes) >= 4
    for pid, words in processes.items():
        for name in ("cmdline", "environ", "status", "comm"):
            assert not _found(secrets, Path(f"/proc/{pid}/{name}").read_bytes()), (pid, name)
        if "ip netns exec" not in words:
            limits = Path(f"/proc/{pid}/limits").read_text()
            assert re.findall(r"Max core file size +(\S+) +(\S+)", limits) == [("0", "0")], words


@pytest.mark.parametrize("unit", sorted(_UNITS.glob("*.service")), ids=lambda path: path.name)
def test_no_unit_leaves_its_memory_behind_when_it_crashes(unit: Path) -> None:
    assert "\nLimitCORE=0\n" in unit.read_text()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"one\ntwo\n", "more than one line"),
        (b"metadata_proxy_shared_secret = abc\n", "only the secret"),
        (b"\xef\xbb\xbfabc\n", "byte order mark"),
        (b"a\0bc\n", "control character"),
    ],
)
def test_what_can_be_no_secret_of_novas_is_refused_and_the_one_before_stays(
    world: NovaWorld, data: bytes, words: str
) -> None:
    file = world.daemon.directory / "secret"
    try:
        file.write_bytes(data)
        for command in ("reload", "check"):
            done = world.daemon.command(command)
            assert (done.status, words in done.out + done.err) == (78, True)
            assert "abc" not in done.out + done.err
        assert world.red.ask("/openstack").status == 200
    finally:
        world.daemon.write_secret("secret", SECRET)
