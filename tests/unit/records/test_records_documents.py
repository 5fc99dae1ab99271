from __future__ import annotations

from imdsproxy.core.records import Fault, Refused, parse_records

NETWORK = {"id": "n", "listener": {"bridge": "br0"}}
INSTANCE = {"id": "i", "name": "web"}


def test_good_records_stand_beside_bad_ones() -> None:
    records = parse_records(
        {"networks": [NETWORK, {"id": "x"}], "instances": [INSTANCE, {"id": "y", "name": 7}, 8]}
    )
    assert [(path, network.id) for path, network in records.networks] == [(("networks", 0), "n")]
    assert [(path, each.id) for path, each in records.instances] == [(("instances", 0), "i")]
    refused = [one for _, one in records.found if isinstance(one, Refused)]
    assert [one.id for one in refused] == ["x", "y", None]
    assert [problem.field for problem in records.all_problems] == [
        "networks[1].listener",
        "instances[1].name",
        "instances[2]",
    ]


def test_an_empty_document_has_no_records_and_no_problems() -> None:
    assert parse_records(None).all_problems == ()
    assert parse_records({}).all_problems == ()


def test_a_document_with_an_unknown_key_has_no_records() -> None:
    records = parse_records({"instance": [INSTANCE], "networks": [NETWORK]})
    assert not records.networks
    assert [problem.field for problem in records.problems] == ["instance"]


def test_a_list_in_place_of_a_document_is_refused() -> None:
    assert parse_records([INSTANCE]).problems


def test_a_fault_inside_a_record_refuses_that_record_only() -> None:
    fault = Fault(("instances", 1, "tags", "a"), "is there twice", line=9)
    other = INSTANCE | {"id": "j", "tags": {"a": "b"}}
    records = parse_records({"instances": [INSTANCE, other]}, file="f", faults=[fault])
    assert [each.id for _path, each in records.instances] == ["i"]
    assert str(records.all_problems[0]) == "f:9: instances[1].tags.a: is there twice"


def test_a_fault_outside_the_records_refuses_the_document() -> None:
    records = parse_records(
        {"instances": [INSTANCE]}, faults=[Fault(("instances",), "is there twice")]
    )
    assert not records.instances
    assert records.problems
