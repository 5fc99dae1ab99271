"""What `explain --path` says of a policy is what HAProxy does by it, however a path is spelt.

One HAProxy answers for all: at the frontend `found` each request brings its own record. Who has the documents answers
200 to everything, so that another status is a rule's.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Final, TypeAlias

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from imdsproxy.core.haproxy.model import DataplaneSpec, Limits
from imdsproxy.core.model import InstanceId, NetworkId
from imdsproxy.core.path_rules import PathRules, PathWord, render_set, sort_paths
from imdsproxy.core.policy import (
    BOOT_GRACE_S,
    LONGEST_BOOT_S,
    OperatorOverride,
    Policy,
    TokenMode,
    render_policy_word,
)
from imdsproxy.core.policy_report import decide_read
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
_Clock: TypeAlias = Callable[[int], tuple[int | None, OperatorOverride]]
"""When the instance was made and reopened, by the time that it is now."""


def _created(ago: int) -> _Clock:
    return lambda now: (now - ago, OperatorOverride())


_LONG_AGO: Final[_Clock] = _created(10 * LONGEST_BOOT_S)
_CLOCKS: Final[Mapping[str, _Clock]] = {
    "of unknown age": lambda _: (None, OperatorOverride()),
    "made long ago": _LONG_AGO,
    "made now": _created(0),
    "in the last second of its boot": _created(BOOT_GRACE_S - 1),
    "in the second after its boot": _created(BOOT_GRACE_S),
    "with the longest boot ahead": _created(BOOT_GRACE_S - LONGEST_BOOT_S),
    "with a second more ahead": _created(BOOT_GRACE_S - LONGEST_BOOT_S - 1),
    "made eight days ahead": _created(-8 * 86_400),
    "made in the last second of a signed 32-bit clock": lambda _: (2**31 - 1, OperatorOverride()),
    "reopened now": lambda now: (1, OperatorOverride(1, now)),
    "reopened long ago": lambda now: (1, OperatorOverride(2, now - BOOT_GRACE_S)),
    "reopened eight days ahead": lambda now: (1, OperatorOverride(1, now + 8 * 86_400)),
    "made eight days ahead and reopened now": lambda now: (
        now + 8 * 86_400,
        OperatorOverride(1, now),
    ),
}
_REQUIRED: Final = TokenMode.REQUIRED
_TABLE: Final[Mapping[str, Policy]] = {
    "sealed": Policy(seal_user_data=True),
    "sealed, no tokens": Policy(tokens=TokenMode.OFF, seal_user_data=True),
    "required in EC2's tree": Policy(tokens=_REQUIRED),
    "required in each tree": Policy(
        tokens=_REQUIRED, openstack_tokens=_REQUIRED, nocloud_tokens=_REQUIRED
    ),
    "required, a path open": Policy(
        openstack_tokens=_REQUIRED, paths=(("/openstack", PathWord.OPTIONAL),)
    ),
    "paths required": Policy(
        paths=(("/latest", PathWord.REQUIRED), ("/openstack", PathWord.REQUIRED))
    ),
    "the longest boot": Policy(
        boot_grace_s=LONGEST_BOOT_S, seal_user_data=True, nocloud_tokens=_REQUIRED
    ),
    "no boot": Policy(boot_grace_s=0, seal_user_data=True, openstack_tokens=_REQUIRED),
    "sealed, all denied": Policy(seal_user_data=True, paths=(("/", PathWord.DENY),)),
    "endpoint off": Policy(endpoint=False, seal_user_data=True),
}
_READ: Final = (
    "/latest/user-data",
    "/2012-01-12/user-data?x=y",
    "/latest/meta-data/hostname",
    "/latest/api/token",
    "/openstack/latest/user_data",
    "/openstack/latest/meta_data.json",
    "/nocloud/user-data",
    "/nocloud/meta-data",
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
    tabled = [policy.paths for policy in _TABLE.values() if policy.paths]
    sets = {key: value for rules in (*_SETS, *tabled) for key, value in render_set(rules).items()}
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


def _status(guest: Asker, word: str, target: str, *, token: bool, epoch: int = 0) -> int:
    record = render_map_value(EmbeddedRecord(_INSTANCE, "r1", word))
    headers = [
        f"{HEADER_RECORD}: {record}",
        f"{HEADER_NETWORK}: {_NETWORK}",
        f"{HEADER_ADDRESS}: 10.0.0.5",
    ]
    if token:
        minted = mint_token(_KEY, _NETWORK, _INSTANCE, epoch, int(time.time()) + 600)
        headers.append(f"X-aws-ec2-metadata-token: {minted}")
    return guest.ask(target, headers=headers).status


def _agree(guest: Asker, policy: Policy, clock: _Clock, target: str) -> None:
    for token in (False, True):
        # Both read a clock: what they say counts where it has not moved on between the two.
        while True:
            now = int(time.time())
            created, guard = clock(now)
            word = render_policy_word(policy, guard, created)
            decided = decide_read(word, now, target, token=token, paths=policy.paths)
            answered = _status(guest, word, target, token=token, epoch=guard.epoch)
            if int(time.time()) == now:
                break
        assert answered == (decided.status or 200), (word, now, target, token, decided, policy)


def _is_plain_http(target: str) -> bool:
    # Others HAProxy refuses before it looks at any rule; a whole URI is no path.
    return target.startswith("/") and all("!" <= one <= "~" and one != "#" for one in target)


@settings(max_examples=600, derandomize=True, deadline=None, database=None)
@given(
    policy=_POLICIES,
    clock=st.sampled_from(list(_CLOCKS)),
    target=st.one_of(spellings(), st.sampled_from(PATHS)).filter(_is_plain_http),
)
@example(
    policy=Policy(paths=(("/", PathWord.DENY),)), clock="made long ago", target="/latest/api/token"
)
@example(policy=Policy(paths=(("/", PathWord.DENY),)), clock="made long ago", target="/ec2")
def test_what_is_told_of_a_policy_is_what_haproxy_does(
    guest: Asker, policy: Policy, clock: str, target: str
) -> None:
    _agree(guest, policy, _CLOCKS[clock], target)


@pytest.mark.parametrize("clock", _CLOCKS)
@pytest.mark.parametrize("policy", _TABLE)
def test_the_end_of_a_boot_is_the_same_to_explain_as_to_haproxy(
    guest: Asker, policy: str, clock: str
) -> None:
    for target in _READ:
        _agree(guest, _TABLE[policy], _CLOCKS[clock], target)


def test_every_hand_written_spelling_is_told_of_as_haproxy_does(guest: Asker) -> None:
    policies = [Policy(tokens=TokenMode.REQUIRED, paths=rules) for rules in _SETS[:40]]
    for number, target in enumerate(filter(_is_plain_http, HAND_WRITTEN)):
        _agree(guest, policies[number % len(policies)], _LONG_AGO, target)


def test_around_each_path_of_a_rule_it_is_told_as_haproxy_does(guest: Asker) -> None:
    around = [
        target
        for path in _RULE_PATHS
        for target in (path, f"{path}/x", f"{path}x", path.replace("latest", "2012-08-10"))
    ]
    for rules in _SETS[:12]:
        for target in around:
            _agree(guest, Policy(tokens=TokenMode.REQUIRED, paths=rules), _LONG_AGO, target)
