"""Records as forms and back."""

from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imdsproxy.api.bodies import merge_patch
from imdsproxy.console.forms import (
    Form,
    Input,
    Rows,
    edited_keys,
    make_form,
    plan_patch,
    read_form,
    show_record,
)
from imdsproxy.errors import Problem
from imdsproxy.model.records import INSTANCE, NETWORK, parse_instance, parse_network, render_record

_KEY: Final = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGnJ a@b"
_INSTANCE: Final[dict[str, Any]] = {
    "id": "web",
    "name": "web",
    "hostname": "web",
    "project": "shop",
    "ports": [
        {"network": "blue", "mac": "52:54:00:12:34:56", "addresses": ["10.0.0.5", "2001:db8::5"]},
        {"network": "red"},
    ],
    "ssh_keys": [{"name": "a@b", "key": _KEY}],
    "tags": {"a=b": "x\ny", "role": "", "": "odd"} | {"": "odd"},
    "dialects": {"ec2": False},
    "policy": {
        "tokens": "required",
        "endpoint": False,
        "burst": 20,
        "paths": {"/latest/x": "deny"},
    },
}
_NETWORK: Final[dict[str, Any]] = {
    "id": "blue",
    "name": "Blue",
    "listener": {"namespace": "q", "device": "eth0", "manage_addresses": True},
    "subnets": [{"cidr": "10.0.0.0/24", "gateway": "10.0.0.1", "dns": ["10.0.0.2", "10.0.0.3"]}],
    "mtu": 1400,
    "mac_check": False,
    "policy": {"hop_limit": 1},
}


def _record(kind: str) -> dict[str, Any]:
    """A record as the daemon gives it."""
    if kind == "network":
        return dict(render_record(parse_network(_NETWORK)))  # type: ignore[arg-type] # it is acceptable
    body = {**_INSTANCE, "tags": {"a=b": "x\ny", "role": ""}}
    return dict(render_record(parse_instance(body)))  # type: ignore[arg-type] # as above


@pytest.mark.parametrize("kind", ["instance", "network"])
def test_a_form_that_is_sent_as_it_was_shown_changes_nothing(kind: str) -> None:
    record = _record(kind)
    wanted, problems = read_form(kind, show_record(kind, record))
    assert problems == []
    kept = {key: value for key, value in record.items() if key in edited_keys(kind)}
    assert plan_patch(kept, wanted) == {}


@pytest.mark.parametrize(("kind", "table"), [("instance", INSTANCE), ("network", NETWORK)])
def test_a_form_has_every_key_of_its_record_but_those_that_are_named_here(
    kind: str,
    table: Any,
) -> None:
    elsewhere = {"id", "user_data", "user_data_file", "vendor_data", "created_at", "scope"}
    assert {*table.names} - edited_keys(kind) <= elsewhere


def _change(**inputs: str) -> dict[str, Any]:
    """The patch of an instance whose inputs are changed; `__` stands for what no keyword has."""
    record = _record("instance")
    sent = show_record("instance", record) | inputs
    wanted, problems = read_form("instance", sent)
    assert problems == []
    kept = {key: value for key, value in record.items() if key in edited_keys("instance")}
    patch = plan_patch(kept, wanted)
    assert merge_patch(kept, patch) == wanted
    return patch


@pytest.mark.parametrize(
    ("inputs", "patch"),
    [
        ({"project": ""}, {"project": None}),
        ({"instance_type": "m1"}, {"instance_type": "m1"}),
        # What no record can be without is sent blank: the daemon says that it is.
        ({"name": ""}, {"name": ""}),
        ({"tags[0].name": "", "tags[0].value": ""}, {"tags": {"a=b": None}}),
        ({"tags[9].name": "owner", "tags[9].value": "anna"}, {"tags": {"owner": "anna"}}),
        ({"policy.tokens": ""}, {"policy": {"tokens": None}}),
        ({"policy.endpoint": "true"}, {"policy": {"endpoint": True}}),
        ({"policy.burst": "many"}, {"policy": {"burst": "many"}}),
        ({"policy.burst": " 7 "}, {"policy": {"burst": 7}}),
        ({"policy.paths[0].word": "allow"}, {"policy": {"paths": {"/latest/x": "allow"}}}),
        ({"dialects.ec2": "true"}, {"dialects": None}),
        ({"upstream": "nova"}, {"upstream": "nova"}),
        (
            {"ports[1].network": "", "ports[0].addresses": "10.0.0.6,\t10.0.0.7"},
            {
                "ports": [
                    {
                        "network": "blue",
                        "mac": "52:54:00:12:34:56",
                        "addresses": ["10.0.0.6", "10.0.0.7"],
                    }
                ]
            },
        ),
        # A key without a name is named by its comment.
        ({"ssh_keys[0].name": ""}, {"ssh_keys": [_KEY]}),
    ],
)
def test_what_is_changed_in_a_form_is_a_patch_of_just_that(
    inputs: dict[str, str], patch: dict[str, Any]
) -> None:
    assert _change(**inputs) == patch


def test_a_name_that_is_there_twice_is_no_silent_loss() -> None:
    sent = {"tags[0].name": "role", "tags[0].value": "a", "tags[3].name": "role"}
    _, problems = read_form("instance", {"name": "web", **sent})
    assert [one.field for one in problems] == ["tags"]


def _inputs(form: Form) -> dict[str, Input | Rows]:
    found: dict[str, Input | Rows] = {}
    for part in (part for section in form.sections for part in section.parts):
        found[part.name] = part
        if isinstance(part, Rows):
            found |= {cell.name: cell for row in part.rows for cell in row}
    return found


@pytest.mark.parametrize(
    ("field", "shown_at"),
    [
        ("hostname", "hostname"),
        ("ports[0].addresses[1]", "ports[0].addresses"),
        ("ports[1].network", "ports[1].network"),
        ("ports", "ports"),
        ("tags.role", "tags"),
        ('tags["a b"]', "tags"),
        ("policy.hop_limit", "policy.hop_limit"),
        ("policy.paths", "policy.paths"),
        ("user_data", None),
        ("name_of_nothing", None),
    ],
)
def test_a_problem_is_shown_at_its_input_or_above_all(field: str, shown_at: str | None) -> None:
    problem = Problem(field, "is wrong")
    form = make_form("instance", show_record("instance", _record("instance")), [problem])
    wrong = [name for name, one in _inputs(form).items() if one.errors]
    assert wrong == ([] if shown_at is None else [shown_at])
    assert form.errors == (() if shown_at else (problem,))


def test_rules_are_folded_away_unless_one_is_set_or_wrong() -> None:
    plain = show_record("instance", {"name": "web"})

    def is_open(sent: dict[str, str], *problems: Problem) -> bool:
        (section,) = (one for one in make_form("instance", sent, problems).sections if one.folded)
        return section.in_use

    assert not is_open(plain)
    assert is_open(plain | {"policy.burst": "7"})
    assert is_open(plain | {"policy.paths[0].path": "/latest"})
    assert is_open(plain, Problem("policy.burst", "is wrong"))


_JSON = st.recursive(
    st.text() | st.integers() | st.booleans() | st.lists(st.text()),
    lambda inner: st.dictionaries(st.text(), inner, max_size=3),
)
_MAPPINGS = st.dictionaries(st.text(), _JSON, max_size=4)


@given(_MAPPINGS, _MAPPINGS)
def test_a_planned_patch_makes_one_mapping_of_another(
    known: dict[str, Any], wanted: dict[str, Any]
) -> None:
    assert merge_patch(known, plan_patch(known, wanted)) == wanted


@given(st.dictionaries(st.text(), st.text()))
def test_whatever_a_browser_sends_is_read(sent: dict[str, str]) -> None:
    for kind in ("instance", "network"):
        record, _ = read_form(kind, sent)
        make_form(kind, sent, [])
        assert record.keys() <= edited_keys(kind)
