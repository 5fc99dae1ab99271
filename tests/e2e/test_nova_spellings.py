"""However a path is spelt: what its plain spelling is refused, no other spelling reads from genuine Nova.

One instance asks in six networks, each with another policy. Nova's own answer where everything may be read says what
must be refused in the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import pytest
from hypothesis import example, given, settings

from support.guest import Asker, Reply, answers
from support.openstack.lab import OpenStack
from support.openstack.oracle import Oracle, Request, Said, said_to_guest
from support.openstack.ways import open_ways
from support.spellings import HAND_WRITTEN, spellings

pytestmark = [pytest.mark.root, pytest.mark.slow]

_ADDRESS: Final = "10.0.0.99"
_EVERYTHING: Final = {"tokens": "required", "openstack_tokens": "required"}
_RULES: Final[Mapping[str, Mapping[str, object]]] = {
    "net-blue": {},
    "net-blue2": _EVERYTHING,
    "net-green": {"tokens": "required"},
    "net-red": {"openstack_tokens": "required"},
    "r-blue": {"seal_user_data": True, "paths": {"/latest/meta-data": "required"}},
    "r-red": {"paths": {"/": "deny", "/openstack": "allow"}},
}
_ROLES: Final = dict(
    zip(_RULES, ("open", "token", "ec2", "openstack", "sealed", "denied"), strict=True)
)
_KEEPING: Final[Mapping[str, tuple[str, ...]]] = {
    "ec2": ("ec2", "denied"),
    "meta-data": ("sealed",),
    "openstack": ("openstack",),
}
"""Who must not be told what is there only."""


@dataclass(slots=True)
class _Twins:
    """The same instance in each network, by what is refused there; which trees, or parts of them, have an answer."""

    askers: Mapping[str, Asker]
    trees: Mapping[tuple[str, bytes], frozenset[str]]
    user_data: bytes
    read: set[str] = field(default_factory=set)

    def wrong(self, target: str) -> list[str]:
        """What somebody is told of a target that he must not be."""
        told = answers(self.askers, target)
        wrong: list[str] = []
        opened = told["open"]
        if opened.status == 200:
            self.read.add(target)
            for tree in self.trees.get(_key(said_to_guest(opened)), frozenset()):
                for name in _KEEPING[tree]:
                    wrong += _open(told, name)
            wrong += _open(told, "token")
            if self.user_data in opened.body:
                wrong += _open(told, "sealed")
        for name, one in told.items():
            if self.user_data in one.body and name in ("token", "sealed"):
                wrong.append(f"{name}: the user-data")
        return wrong


def _key(said: Said) -> tuple[str, bytes]:
    return dict(said.headers).get("content-type", ""), said.body


def _open(told: Mapping[str, Reply], name: str) -> list[str]:
    return [] if told[name].status in (400, 401, 403) else [f"{name}: {told[name].status}"]


@pytest.fixture(scope="module")
def twins(openstack: OpenStack) -> Iterator[_Twins]:
    one = openstack.instances["blue-1"]
    with open_ways(
        openstack, source="records", ways=("listener",), more={name: [_ADDRESS] for name in _RULES}
    ) as ways:
        ports = [{"network": ways.ids[name], "addresses": [_ADDRESS]} for name in _RULES]
        record = {"id": one.uuid, "name": one.name, "project": one.project_id, "upstream": "nova"}
        # Made long ago: its boot is over.
        ways.daemon.put(instances=[{**record, "ports": ports, "created_at": 1}])
        policy = {"networks": {ways.ids[name]: rules for name, rules in _RULES.items() if rules}}
        ways.take_over({**ways.settings(), "policy": policy})
        askers = {
            role: Asker(lambda scope=scope: ways.connect("listener", scope, _ADDRESS))  # type: ignore[misc]
            for scope, role in _ROLES.items()
        }
        oracle = Oracle(openstack)
        found: dict[tuple[str, bytes], set[str]] = {}
        meta: set[tuple[str, bytes]] = set()
        other: set[tuple[str, bytes]] = set()
        for path in oracle.documents(one):
            said = oracle.says(one.uuid, one.project_id, Request(path))
            if said.status == 200:
                tree = "openstack" if path.startswith("/openstack") else "ec2"
                found.setdefault(_key(said), set()).add(tree)
                names = path.split("/")
                if tree == "ec2" and "meta-data" in names:
                    meta.add(_key(said))
                elif tree == "ec2":
                    other.add(_key(said))
        # What both trees have says nothing of where it came from.
        trees = {
            key: frozenset(where) | ({"meta-data"} if key in meta - other else frozenset())
            for key, where in found.items()
            if len(where) == 1
        }
        assert {"ec2", "meta-data", "openstack"} <= {one for some in trees.values() for one in some}
        assert one.user_data
        yield _Twins(askers, trees, one.user_data)
        for asker in askers.values():
            asker.close()


def test_no_hand_written_spelling_reads_from_nova_what_the_plain_one_does_not(
    twins: _Twins,
) -> None:
    found = {target: wrong for target in HAND_WRITTEN if (wrong := twins.wrong(target))}
    assert not found
    # Else nothing would have been tried.
    assert len(twins.read) > len(HAND_WRITTEN) // 8


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(target=spellings())
@example(target="/latest/user-data")
def test_no_spelling_reads_from_nova_what_the_plain_one_does_not(
    twins: _Twins, target: str
) -> None:
    assert not twins.wrong(target)
