"""Nothing that opens something is to be found where it need not be: tokens, their keys, Nova's secret, signatures."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import pytest

from imdsproxy.core.tokens import parse_token_keys
from support.guest import take_token, with_token
from support.health import METRICS, ask_operator
from support.nova_world import INSTANCES, SECRET, NovaWorld, open_nova_world
from support.recorder import signature_of

pytestmark = pytest.mark.root

_UNITS: Final = Path(__file__).parents[2] / "packaging" / "systemd"


@pytest.fixture(scope="module")
def world() -> Iterator[NovaWorld]:
    with open_nova_world() as world:
        world.daemon.configure({**world.daemon.settings, "metrics": METRICS})
        # What listens is not changed while it runs.
        world.daemon.kill_controller()
        world.daemon.start()
        yield world


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
        assert "No such command" not in done.err, done
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
        world.secret_file("secret", SECRET)
