"""What `explain --path` says of a policy is what HAProxy does by it, however a path is spelt.

One HAProxy answers for all: at the frontend `found` each request brings its own record. Who has the documents answers
200 to everything, so that another status is a rule's.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Final

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from imdsproxy.core.haproxy.model import DataplaneSpec, Limits
from imdsproxy.core.model import InstanceId, NetworkId
from imdsproxy.core.path_rules import PathRules, PathWord, render_set, sort_paths
from imdsproxy.core.policy import Guard, Policy, TokenMode, render_policy_word
from imdsproxy.core.policy_decides import decide_read
from imdsproxy.core.tokens import TokenKey, mint_token, render_key_map
from imdsproxy.core.wire import (
    HEADER_ADDRESS,
    HEADER_NETWORK,
    HEADER_RECORD,
    EmbeddedRecord,
    render_map_value,
)
from support.guest import Connection
from support.haproxy_alone import paths_below, run_haproxy
from support.lab import until
from support.spellings import HAND_WRITTEN, PATHS, spellings
from support.twins import Asker

pytestmark = pytest.mark.root

_KEY: Final = TokenKey(b"k" * 32)
_NETWORK: Final = NetworkId("red")
_INSTANCE: Final = InstanceId("web")
_RULE_PATHS: Final = (
    "/",
    "/latest",
    "/latest/meta-data",
    "/latest/meta-data/hostname",
    "/latest/user-data",
    "/openstack",
    "/openstack/latest",
    "/openstack/latest/user_data",
    "/openstack/content",
    "/nocloud",
    "/nocloud/user-data",
)


def _rule_sets() -> tuple[PathRules, ...]:
    """HAProxy reads them when it starts, so they are the same for all examples."""
    random = Random(37)  # noqa: S311 - they are to be various, and always the same
    words = tuple(PathWord)
    chosen = [
        {path: random.choice(words) for path in random.sample(_RULE_PATHS, random.randint(1, 4))}
        for _ in range(250)
    ]
    return tuple(sort_paths(one.items()) for one in chosen)


_SETS: Final = (
    (("/", PathWord.DENY),),
    *_rule_sets(),
)
_MODES: Final = st.sampled_from(TokenMode)
_POLICIES: Final = st.builds(
    Policy,
    endpoint=st.sampled_from((True,) * 15 + (False,)),
    tokens=_MODES,
    openstack_tokens=_MODES,
    nocloud_tokens=_MODES,
    seal_user_data=st.sampled_from((False, False, False, True)),
    paths=st.sampled_from(((), *_SETS)),
)


def _answer_everything(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=_answer, args=(connection,), daemon=True).start()


def _answer(connection: socket.socket) -> None:
    heard = b""
    with connection, contextlib.suppress(OSError):
        while said := connection.recv(65_536):
            heard += said
            while b"\r\n\r\n" in heard:
                _, _, heard = heard.partition(b"\r\n\r\n")
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asker]:
    """Who asks as the resolver does."""
    place = tmp_path_factory.mktemp("agrees")
    paths = paths_below(place)
    keys = render_key_map((_KEY,))
    sets = {key: value for rules in _SETS for key, value in render_set(rules).items()}
    for path, entries in ((paths.token_keys, keys), (paths.path_rules, sets)):
        Path(path).write_text("".join(f"{key} {value}\n" for key, value in entries.items()))
    spec = DataplaneSpec((), paths, Limits(maxconn=200, cache_mb=0))

    def connect() -> Connection:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(10)
        client.connect(paths.found)
        return Connection(client)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(paths.documents[0])
        listener.listen(64)
        threading.Thread(target=_answer_everything, args=(listener,), daemon=True).start()
        with run_haproxy(spec, place):
            until(Path(paths.found).exists, within_s=20, what="HAProxy's socket")
            asker = Asker(connect)
            yield asker
            asker.close()


def _status(guest: Asker, word: str, target: str, *, token: bool) -> int:
    record = render_map_value(EmbeddedRecord(_INSTANCE, "r1", word))
    headers = [
        f"{HEADER_RECORD}: {record}",
        f"{HEADER_NETWORK}: {_NETWORK}",
        f"{HEADER_ADDRESS}: 10.0.0.5",
    ]
    if token:
        minted = mint_token(_KEY, _NETWORK, _INSTANCE, 0, int(time.time()) + 600)
        headers.append(f"X-aws-ec2-metadata-token: {minted}")
    return guest.ask(target, headers=headers).status


def _agree(guest: Asker, policy: Policy, born: int | None, target: str) -> None:
    now = int(time.time())
    word = render_policy_word(policy, Guard(), born)
    for token in (False, True):
        decided = decide_read(word, now, target, token=token, paths=policy.paths)
        told = _status(guest, word, target, token=token)
        assert told == (decided.status or 200), (word, target, token, decided, policy.paths)


def _is_plain_http(target: str) -> bool:
    # Others HAProxy refuses before it looks at any rule; a whole URI is no path.
    return target.startswith("/") and all("!" <= one <= "~" and one != "#" for one in target)


@settings(max_examples=600, derandomize=True, deadline=None, database=None)
@given(
    policy=_POLICIES,
    booting=st.booleans(),
    target=st.one_of(spellings(), st.sampled_from(PATHS)).filter(_is_plain_http),
)
@example(policy=Policy(paths=(("/", PathWord.DENY),)), booting=False, target="/latest/api/token")
@example(policy=Policy(paths=(("/", PathWord.DENY),)), booting=False, target="/ec2")
def test_what_is_told_of_a_policy_is_what_haproxy_does(
    guest: Asker, policy: Policy, *, booting: bool, target: str
) -> None:
    _agree(guest, policy, int(time.time()) if booting else 1, target)


def test_every_hand_written_spelling_is_told_of_as_haproxy_does(guest: Asker) -> None:
    policies = [Policy(tokens=TokenMode.REQUIRED, paths=rules) for rules in _SETS[:40]]
    for number, target in enumerate(filter(_is_plain_http, HAND_WRITTEN)):
        _agree(guest, policies[number % len(policies)], 1, target)


def test_around_each_path_of_a_rule_it_is_told_as_haproxy_does(guest: Asker) -> None:
    around = [
        target
        for path in _RULE_PATHS
        for target in (path, f"{path}/x", f"{path}x", path.replace("latest", "2012-08-10"))
    ]
    for rules in _SETS[:12]:
        for target in around:
            _agree(guest, Policy(tokens=TokenMode.REQUIRED, paths=rules), 1, target)
