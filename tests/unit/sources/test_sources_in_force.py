"""Which of several records with one id or address are in force, while files change."""

import time
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import ip_address
from typing import Final, TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imdsproxy.errors import Problem
from imdsproxy.model.claims import address_keys
from imdsproxy.model.entities import Instance, InstanceId, NetworkId, Port
from imdsproxy.model.observation import AddressKey
from imdsproxy.sources.in_force import Entry, InForce

_BAD: Final = Problem("name", "is bad")
_Entry: TypeAlias = Instance | str
"""A text in place of an instance stands for a bad record with that id."""


def made(name: str, *numbers: int, version: str = "v1") -> Instance:
    addresses = tuple(ip_address(f"10.0.0.{number}") for number in numbers)
    ports = (Port(NetworkId("n1"), None, addresses),)
    return Instance(InstanceId(name), version, "host", ports=ports)


def _entries(text: str) -> list[_Entry]:
    """`a12` has the addresses 1 and 2, `a1*` is another version of `a1`, and `a!` is bad."""
    return [
        each[0]
        if each.endswith("!")
        else made(
            each[0],
            *map(int, each[1:].removesuffix("*")),
            version="v2" if each.endswith("*") else "v1",
        )
        for each in text.split()
    ]


class Files:
    """Files of instances."""

    def __init__(self) -> None:
        self.in_force: InForce[Instance] = InForce(
            lambda instance: sorted(address_keys(instance), key=lambda key: int(key[1])),
            lambda entry: ((entry.id,), entry.file),
        )

    def write(self, files: Mapping[str, Sequence[_Entry]], *, unclear: bool = False) -> set[str]:
        for file, entries in files.items():
            self.in_force.replace_file(
                file,
                [
                    Entry(each, file, number, problems=(_BAD,))
                    if isinstance(each, str)
                    else Entry(str(each.id), file, number, record=each)
                    for number, each in enumerate(entries)
                ],
                unclear=unclear,
            )
        return set(self.in_force.settle())

    @property
    def records(self) -> dict[str, Instance]:
        return self.in_force.records

    @property
    def refused(self) -> str:
        """Which records are refused, each with the file of the one that stands against it, or that it is bad."""
        return " ".join(
            f"{each.record}!"
            if each.reason == _BAD.reason
            else f"{each.record}<{each.reason.rstrip(')')[-1]}"
            for each in self.in_force.problems()
        )


@pytest.mark.parametrize(
    ("steps", "in_force", "refused"),
    [
        # One that breaks keeps its version until it is mended.
        ("x: a1 | x: a!", "a1", "a!"),
        ("x: a1 | x: a! | x: a2", "a2", ""),
        # At first it goes by file and position.
        ("z: c1, y: b2 a1 d1", "a1 b2", "c<y d<y"),
        # A newcomer to a taken address; one that changes and keeps its own; a change to a taken one.
        ("z: a1 | a: b12", "a1", "b<z"),
        ("z: a1 | a: b1, z: a1*", "a1*", "b<z"),
        ("x: a1 b2 | x: a1 b1", "a1 b2", "b<x"),
        # b gives 2 to c, but may not have 1: it falls back to 2, and so c to 3.
        ("x: a1 b2 c3 | x: a1 b1 c2", "a1 b2 c3", "b<x c<x"),
        # b wants 1 (taken) and 9; c and the new d want 9, which b does not get.
        ("x: a1 b2 c3 | x: a1 b91 c9 d3", "a1 b2 c9 d3", "b<x"),
        # a takes 9 before c does, and 2 from b; but b may not have 7, so that a has to go back too.
        ("x: z7 a1 b2 c3 | x: z7 a29 b7 c9", "z7 a1 b2 c9", "a<x b<x"),
        # An id twice, in two files and in one; a good double of a bad one.
        ("z: a1 | b: a2", "a1", "a<z"),
        ("x: a1 | x: a2 a1", "a1", "a<x"),
        ("x: a1 | y: a2 | x: a!", "a1", "a! a<x"),
    ],
)
def test_what_is_in_force_stays_until_it_changes_itself(
    steps: str, in_force: str, refused: str
) -> None:
    """Each step writes files: `x: a1 b2, y: c3`."""
    files = Files()
    for step in steps.split(" | "):
        contents = (each.split(": ") for each in step.split(", "))
        files.write({file: _entries(text) for file, text in contents})
    assert sorted(files.records.values(), key=str) == sorted(_entries(in_force), key=str)
    assert files.refused == refused


def test_a_refusal_says_whether_the_version_before_it_stays_in_force() -> None:
    files = Files()
    files.write({"x": _entries("a1 b2")})
    files.write({"x": _entries("a1 b1 c1")})
    hints = {problem.record: problem.hint for problem in files.in_force.problems()}
    assert hints == {
        "b": "change one of the two, or remove it; the version before it stays in force",
        "c": "change one of the two, or remove it",
    }


def test_ten_thousand_changes_to_one_address_are_settled_in_seconds() -> None:
    files = Files()
    files.write({"x": [made(f"i{n}") for n in range(10_000)]})
    begin = time.process_time()
    files.write({"x": [made(f"i{n}", 1) for n in range(10_000)]})
    assert time.process_time() - begin < 10
    assert sum(bool(each.ports[0].addresses) for each in files.records.values()) == 1


def test_a_start_makes_no_more_claims_of_a_record_than_it_needs() -> None:
    made_of: list[str] = []

    def claims(instance: Instance) -> frozenset[AddressKey]:
        made_of.append(instance.id)
        return address_keys(instance)

    in_force: InForce[Instance] = InForce(claims, lambda entry: ((entry.id,), entry.file))
    records = [made(f"i{number}", number) for number in range(100)]
    in_force.replace_file("x", [Entry(one.id, "x", 0, record=one) for one in records])
    in_force.settle()
    # Once to compare it, once to hold it.
    assert len(made_of) == 200


_instances = st.builds(
    lambda name, numbers, version: made(name, *numbers, version=version),
    st.sampled_from("abcd"),
    st.lists(st.integers(1, 4), max_size=2, unique=True),
    st.sampled_from(["v1", "v2"]),
)
_steps = st.lists(
    st.tuples(
        st.sampled_from("xyz"),
        st.lists(_instances | st.sampled_from("abcd"), max_size=3),
        st.booleans(),
    ),
    max_size=8,
)


def _addresses(records: Iterable[Instance]) -> list[AddressKey]:
    return [key for record in records for key in address_keys(record)]


@given(_steps)
@settings(max_examples=settings().max_examples * 4, deadline=None)
def test_whatever_happens_no_address_is_in_force_twice_and_changes_are_reported(
    steps: list[tuple[str, list[Instance | str], bool]],
) -> None:
    files = Files()
    latest: dict[str, list[Instance | str]] = {}
    for file, entries, unclear in steps:
        before = files.records
        changed = files.write({file: entries}, unclear=unclear)
        after = files.records
        latest[file] = entries
        assert changed == {
            key for key in before.keys() | after.keys() if before.get(key) != after.get(key)
        }
        held = _addresses(after.values())
        assert len(held) == len(set(held))
        good = [one for many in latest.values() for one in many if isinstance(one, Instance)]
        for key, record in after.items():
            assert record in good or before.get(key) == record
        wanted = [*after.values(), *(one for one in good if one.id not in after)]
        if len(_addresses(wanted)) == len(set(_addresses(wanted))):
            # Nothing stands against those that are not in force: there are none.
            assert {one.id for one in good} <= after.keys()
