"""What is in force of some files, step by step, without files."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address

from hypothesis import given, settings
from hypothesis import strategies as st

from imdsproxy.core.inventory import address_keys
from imdsproxy.core.model import Instance, InstanceId, NetworkId, Port
from imdsproxy.core.observation import AddressKey
from imdsproxy.errors import Problem
from imdsproxy.sources.in_force import Clash, Entry, InForce

N1 = NetworkId("n1")
BAD = Problem("name", "is bad")


def made(name: str, *numbers: int, version: str = "v1") -> Instance:
    addresses = tuple(ip_address(f"10.0.0.{number}") for number in numbers)
    return Instance(InstanceId(name), version, "host", ports=(Port(N1, None, addresses),))


def _claims(instance: Instance) -> list[AddressKey]:
    return sorted(address_keys(instance), key=lambda key: int(key[1]))


def _explain(clash: Clash[Instance]) -> Iterator[Problem]:
    what = ", ".join(str(address) for _network, address in clash.addresses) or "id"
    yield Problem(clash.entry.id, f"{what} of {clash.other.id}", file=clash.entry.file)


@dataclass
class Files:
    """Files of instances; a text in place of one stands for a bad record with that id."""

    in_force: InForce[Instance] = field(
        default_factory=lambda: InForce[Instance](_claims, _explain)
    )

    def write(self, file: str, *entries: Instance | str, unclear: bool = False) -> set[str]:
        self.stage(file, *entries, unclear=unclear)
        return set(self.in_force.settle())

    def stage(self, file: str, *entries: Instance | str, unclear: bool = False) -> None:
        self.in_force.replace_file(
            file,
            [
                Entry(entry, file, number, problems=(BAD,))
                if isinstance(entry, str)
                else Entry(str(entry.id), file, number, record=entry)
                for number, entry in enumerate(entries)
            ],
            unclear=unclear,
        )

    @property
    def records(self) -> dict[str, Instance]:
        return self.in_force.records

    @property
    def reported(self) -> list[str]:
        return [f"{problem.field}: {problem.reason}" for problem in self.in_force.problems()]


def by_id(*instances: Instance) -> dict[str, Instance]:
    return {each.id: each for each in instances}


def test_good_records_are_in_force_and_go_with_their_file() -> None:
    files = Files()
    assert files.write("x", made("a", 1), made("b", 2)) == {"a", "b"}
    assert files.records == by_id(made("a", 1), made("b", 2))
    assert files.write("x") == {"a", "b"}
    assert not files.records


def test_a_record_that_breaks_keeps_its_version_before() -> None:
    files = Files()
    files.write("x", made("a", 1))
    assert files.write("x", "a") == set()
    assert files.records == by_id(made("a", 1))
    (problem,) = files.in_force.problems()
    assert "stays in force" in problem.hint
    assert files.write("x", made("a", 2)) == {"a"}
    assert not files.reported


def test_a_broken_record_taken_out_is_gone() -> None:
    files = Files()
    files.write("x", made("a", 1))
    files.write("x", "a")
    assert files.write("x") == {"a"}


def test_a_record_that_was_never_good_is_not_in_force() -> None:
    files = Files()
    assert files.write("x", "a") == set()
    assert files.reported == ["name: is bad"]


def test_while_a_record_has_no_readable_id_nothing_of_its_file_goes() -> None:
    files = Files()
    files.write("x", made("a", 1), made("b", 2))
    assert files.write("x", made("b", 2), unclear=True) == set()
    assert files.records.keys() == {"a", "b"}
    assert files.write("x", made("b", 2)) == {"a"}


def test_from_the_start_the_first_by_file_and_position_has_the_address() -> None:
    files = Files()
    files.stage("z", made("c", 1))
    files.stage("y", made("a", 1), made("b", 1))
    files.in_force.settle()
    assert files.records.keys() == {"a"}
    assert files.reported == ["b: 10.0.0.1 of a", "c: 10.0.0.1 of a"]


def test_a_newcomer_is_refused_an_address_in_force_wherever_its_file_stands() -> None:
    files = Files()
    files.write("z", made("a", 1))
    files.write("a", made("b", 1, 2))
    assert files.records.keys() == {"a"}
    assert files.reported == ["b: 10.0.0.1 of a"]


def test_who_was_refused_comes_in_force_when_the_address_is_free() -> None:
    files = Files()
    files.write("z", made("a", 1))
    files.write("y", made("b", 1))
    assert files.write("z") == {"a", "b"}
    assert files.records.keys() == {"b"}
    assert not files.reported


def test_a_record_that_changes_keeps_its_address_against_a_newcomer() -> None:
    files = Files()
    files.write("z", made("a", 1))
    files.stage("a", made("b", 1))
    files.stage("z", made("a", 1, version="v2"))
    files.in_force.settle()
    assert files.records == by_id(made("a", 1, version="v2"))


def test_a_change_to_a_taken_address_keeps_the_version_before() -> None:
    files = Files()
    files.write("x", made("a", 1), made("b", 2))
    assert files.write("x", made("a", 1), made("b", 1)) == set()
    assert files.records == by_id(made("a", 1), made("b", 2))
    assert files.reported == ["b: 10.0.0.1 of a"]


def test_addresses_are_swapped_and_rotated_in_one_step() -> None:
    files = Files()
    files.write("x", made("a", 1), made("b", 2), made("c", 3))
    files.write("x", made("a", 2), made("b", 3), made("c", 1))
    assert files.records == by_id(made("a", 2), made("b", 3), made("c", 1))


def test_who_took_an_address_gives_it_back_when_its_holder_falls_back() -> None:
    files = Files()
    files.write("x", made("a", 1), made("b", 2), made("c", 3))
    # b gives 2 to c, but may not have 1: it falls back to 2, and so c to 3.
    files.write("x", made("a", 1), made("b", 1), made("c", 2))
    assert files.records == by_id(made("a", 1), made("b", 2), made("c", 3))
    assert sorted(files.reported) == ["b: 10.0.0.1 of a", "c: 10.0.0.2 of b"]


def test_who_lost_to_one_that_fell_back_is_in_force_after_all() -> None:
    files = Files()
    files.write("x", made("a", 1), made("b", 2), made("c", 3))
    # b wants 1 (taken) and 9; c and the new d want 9, which b does not get.
    files.write("x", made("a", 1), made("b", 9, 1), made("c", 9), made("d", 3))
    assert files.records == by_id(made("a", 1), made("b", 2), made("c", 9), made("d", 3))


def test_who_lost_to_one_that_had_to_fall_back_later_is_in_force_after_all() -> None:
    files = Files()
    files.write("x", made("z", 7), made("a", 1), made("b", 2), made("c", 3))
    # a takes 9 before c does, and 2 from b; but b may not have 7, so that a has to go back too.
    files.write("x", made("z", 7), made("a", 2, 9), made("b", 7), made("c", 9))
    assert files.records == by_id(made("z", 7), made("a", 1), made("b", 2), made("c", 9))


def test_an_id_twice_is_in_force_once_and_stays_with_who_had_it() -> None:
    files = Files()
    files.write("z", made("a", 1))
    files.write("b", made("a", 2))
    assert files.records == by_id(made("a", 1))
    assert files.reported == ["a: id of a"]
    files.write("z")
    assert files.records == by_id(made("a", 2))
    assert not files.reported


def test_an_id_twice_in_one_file_stays_with_the_one_in_force() -> None:
    files = Files()
    files.write("x", made("a", 1))
    files.write("x", made("a", 2), made("a", 1))
    assert files.records == by_id(made("a", 1))


def test_a_good_double_does_not_take_over_from_one_that_broke() -> None:
    files = Files()
    files.write("x", made("a", 1))
    files.write("y", made("a", 2))
    files.write("x", "a")
    assert files.records == by_id(made("a", 1))


def test_a_record_moves_from_one_file_to_another() -> None:
    files = Files()
    files.write("x", made("a", 1))
    files.stage("x")
    files.stage("y", made("a", 1))
    assert files.in_force.settle() == {}
    assert files.records.keys() == {"a"}


def test_ten_thousand_changes_to_one_address_are_settled_in_seconds() -> None:
    files = Files()
    many = [made(f"i{n}") for n in range(10_000)]
    files.write("x", *many)
    wrong = [made(f"i{n}", 1) for n in range(10_000)]
    begin = time.process_time()
    files.write("x", *wrong)
    assert time.process_time() - begin < 10
    assert sum(bool(each.ports[0].addresses) for each in files.records.values()) == 1


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
@settings(max_examples=400, deadline=None)
def test_whatever_happens_no_address_is_in_force_twice_and_changes_are_reported(
    steps: list[tuple[str, list[Instance | str], bool]],
) -> None:
    files = Files()
    latest: dict[str, list[Instance | str]] = {}
    for file, entries, unclear in steps:
        before = files.records
        changed = files.write(file, *entries, unclear=unclear)
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


@given(st.lists(_instances, max_size=8))
def test_a_fresh_start_goes_by_the_order_alone(instances: list[Instance]) -> None:
    files = Files()
    files.write("x", *instances)
    wanted: dict[str, Instance] = {}
    first: dict[str, Instance] = {}
    for each in instances:
        first.setdefault(each.id, each)
    for each in first.values():
        if not set(address_keys(each)) & set(_addresses(wanted.values())):
            wanted[each.id] = each
    assert files.records == wanted
