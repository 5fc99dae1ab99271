"""However a path is spelt: what its plain spelling is refused, no other spelling reads.

Nothing here knows which spelling leads where. Each is asked for by instances that differ in their policy only, and
what the one is told that may read everything says what the others must be refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final

import pytest
from hypothesis import given, settings

from support.daemon import Daemon, user_data_of
from support.guest import Asker, Reply, answers
from support.lab import Lab, RecordMapping, ip, until
from support.spellings import HAND_WRITTEN, spellings

pytestmark = pytest.mark.root

_SECRET: Final = user_data_of("twin")
_REFUSED: Final = (400, 401, 403)
_TREES: Final = ("ec2", "openstack", "nocloud")
_REQUIRED: Final = {
    "ec2": {"tokens": "required"},
    "openstack": {"openstack_tokens": "required"},
    "nocloud": {"nocloud_tokens": "required"},
}
_KEPT: Final = {
    "ec2": {"/": "deny", "/openstack": "allow", "/nocloud": "allow"},
    "openstack": {"/openstack": "deny"},
    "nocloud": {"/nocloud": "deny"},
}
_RULES: Final[Mapping[str, Mapping[str, object]]] = {
    "open": {},
    "token": {"tokens": "required", "openstack_tokens": "required", "nocloud_tokens": "required"},
    "sealed": {"seal_user_data": True},
    "off": {"endpoint": False},
    "path token": {"paths": {"/": "required"}},
    "meta-data": {"paths": {"/": "deny", "/latest/meta-data": "allow"}},
    **{f"{tree} open": {} for tree in _TREES},
    **{f"{tree} token": _REQUIRED[tree] for tree in _TREES},
    **{f"{tree} denied": {"paths": _KEPT[tree]} for tree in _TREES},
}
"""By the name of an instance; those that begin with a tree's name have no other tree."""

_ADDRESSES: Final = {name: f"10.0.0.{100 + index}" for index, name in enumerate(_RULES)}


def _record(name: str) -> RecordMapping:
    tree = name.partition(" ")[0]
    off = [one for one in _TREES if tree in _TREES and one != tree]
    return {
        "id": name.replace(" ", "-"),
        "name": "twin",
        # Its boot is over.
        "created_at": 1,
        # By address alone: all of them are one guest.
        "ports": [{"network": "red", "addresses": [_ADDRESSES[name]]}],
        "user_data": _SECRET.decode(),
        "ssh_keys": [{"name": "key", "key": "ssh-ed25519 AAAA twin"}],
        **({"dialects": dict.fromkeys(off, False)} if off else {}),
    }


@dataclass(frozen=True, slots=True)
class _Twins:
    """Everybody of `_RULES`; `daemon` is told what they may read."""

    daemon: Daemon
    askers: Mapping[str, Asker]


@pytest.fixture(scope="module")
def twins() -> Iterator[_Twins]:
    with ExitStack() as stack:
        lab = Lab()
        stack.callback(lab.close)
        policy: dict[str, Any] = {
            "instances": {name.replace(" ", "-"): rules for name, rules in _RULES.items() if rules}
        }
        daemon = Daemon(lab, {"policy": policy})
        stack.callback(daemon.close)
        network = lab.namespace_network("red")
        guest = lab.guest("red")
        for address in _ADDRESSES.values():
            ip("-n", guest.namespace, "address", "add", f"{address}/24", "dev", "eth0")
        daemon.start()
        daemon.put([network], [_record(name) for name in _RULES])
        until(lambda: daemon.status()["serving"] == 1, what="the network's service")
        askers = {
            name: Asker(lambda source=address: guest.connect(source=source))  # type: ignore[misc]
            for name, address in _ADDRESSES.items()
        }
        yield _Twins(daemon, askers)
        for asker in askers.values():
            asker.close()


def _wrong(told: Mapping[str, Reply]) -> list[str]:
    """What somebody was told that he must not be."""
    wrong = [f"{name}: {one.status}" for name, one in told.items() if one.status >= 500]
    wrong += [f"off: {told['off'].status}"] if told["off"].status not in (400, 403) else []
    if told["open"].status == 200:
        wrong += _open(told, "token") + _open(told, "path token")
        if _SECRET in told["open"].body:
            wrong += _open(told, "sealed")
    for name, one in told.items():
        refused = name not in ("open", "sealed") and not name.endswith(" open")
        if refused and _SECRET in one.body:
            wrong.append(f"{name}: the user-data")
    if _SECRET in told["sealed"].body:
        wrong.append("sealed: the user-data")
    for tree in _TREES:
        # The list of trees is of none of them.
        roots = (b"openstack/", b"nocloud/")
        if told[f"{tree} open"].status == 200 and told[f"{tree} open"].body not in roots:
            wrong += _open(told, f"{tree} token") + _open(told, f"{tree} denied")
    return wrong


def _open(told: Mapping[str, Reply], name: str) -> list[str]:
    return [] if told[name].status in _REFUSED else [f"{name}: {told[name].status}"]


def test_no_hand_written_spelling_reads_what_the_plain_one_does_not(twins: _Twins) -> None:
    found = {}
    read = 0
    for target in HAND_WRITTEN:
        told = answers(twins.askers, target)
        read += told["open"].status == 200
        if wrong := _wrong(told):
            found[target] = wrong
    assert not found
    # Else nothing would have been tried.
    assert read > len(HAND_WRITTEN) // 8
    assert twins.askers["token"].kept > read // 2


@settings(max_examples=400, derandomize=True, deadline=None, database=None)
@given(target=spellings())
def test_no_spelling_reads_what_the_plain_one_does_not(twins: _Twins, target: str) -> None:
    assert not _wrong(answers(twins.askers, target))
