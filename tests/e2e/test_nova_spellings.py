"""However a path is spelt: what its plain spelling is refused, no other spelling reads from genuine Nova.

One instance asks in six networks, each with another policy. Which document a spelling reads is seen where everything
may be read.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import pytest
from hypothesis import example, given, settings

from support.guest import Asker, Reply, answers
from support.openstack.lab import OpenStack
from support.openstack.oracle import Oracle, said_to_guest
from support.openstack.ways import open_ways
from support.spellings import HAND_WRITTEN, spellings

pytestmark = [pytest.mark.root, pytest.mark.slow]

_ADDRESS: Final = "10.0.0.99"
_OPEN: Final = "net-blue"
_LOCKED: Final = "net-blue2"
_RULES: Final[Mapping[str, Mapping[str, object]]] = {
    _OPEN: {},
    _LOCKED: {"tokens": "required", "openstack_tokens": "required"},
    "net-green": {"tokens": "required"},
    "net-red": {"openstack_tokens": "required"},
    "r-blue": {"seal_user_data": True, "paths": {"/latest/meta-data": "required"}},
    "r-red": {"paths": {"/": "deny", "/openstack": "allow"}},
}


@dataclass(slots=True)
class _Twins:
    """The same instance in each network.

    Attributes:
        refused: Where a document's plain spellings are all refused.
        read: Spellings that read a document where everything may be read.
    """

    askers: Mapping[str, Asker]
    refused: dict[tuple[str | None, bytes], set[str]] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)

    def learn(self, path: str) -> None:
        """Note where the plain spelling of a path is refused."""
        replies = answers(self.askers, path)
        if replies[_OPEN].status == 200:
            refused = {name for name, reply in replies.items() if reply.status in (401, 403)}
            self.refused.setdefault(_document(replies[_OPEN]), refused).intersection_update(refused)

    def wrong(self, target: str) -> list[str]:
        """Where a spelling reads what no plain spelling does."""
        replies = answers(self.askers, target)
        if replies[_OPEN].status != 200:
            return []
        self.read.add(target)
        refused = self.refused.get(_document(replies[_OPEN]), {_LOCKED})
        return [name for name in refused if replies[name].status not in (400, 401, 403)]


def _document(reply: Reply) -> tuple[str | None, bytes]:
    return reply.headers.get("content-type"), said_to_guest(reply).body


@pytest.fixture(scope="module")
def twins(openstack: OpenStack) -> Iterator[_Twins]:
    one = openstack.instances["blue-1"]
    with open_ways(
        openstack, ways=(), neutron={"enabled": False}, more={name: [_ADDRESS] for name in _RULES}
    ) as ways:
        ports = [{"network": ways.ids[name], "addresses": [_ADDRESS]} for name in _RULES]
        record = {"id": one.uuid, "name": one.name, "project": one.project_id, "upstream": "nova"}
        # Made long ago: its boot is over.
        ways.daemon.put(instances=[{**record, "ports": ports, "created_at": 1}])
        policy = {"networks": {ways.ids[name]: rules for name, rules in _RULES.items() if rules}}
        ways.daemon.reconfigure({**ways.settings(), "policy": policy})
        askers = {
            scope: Asker(lambda scope=scope: ways.connect("listener", scope, _ADDRESS))  # type: ignore[misc]
            for scope in _RULES
        }
        made = _Twins(askers)
        for path in Oracle(openstack).documents(one):
            made.learn(path)
        assert set().union(*made.refused.values()) == _RULES.keys() - {_OPEN}
        yield made
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
