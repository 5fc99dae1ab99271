from __future__ import annotations

import pytest
from pydantic import ValidationError

from imdsproxy.config.describe import explain_finding
from imdsproxy.config.policy import PolicyRulesSettings
from imdsproxy.core.model import Instance, Network
from imdsproxy.core.path_rules import MOST_PATH_RULES
from imdsproxy.core.policy import NO_RULES, RULES, PolicyRules, Rule
from imdsproxy.core.records import Refused, parse_instance, parse_network

_INSTANCE: dict[str, object] = {"id": "i-1", "name": "web"}
_NETWORK: dict[str, object] = {"id": "n", "listener": {"bridge": "br0"}}


def _of_instance(policy: object) -> PolicyRules | Refused:
    found = parse_instance(_INSTANCE | {"policy": policy})
    return found.policy if isinstance(found, Instance) else found


def _of_network(policy: object) -> PolicyRules | Refused:
    found = parse_network(_NETWORK | {"policy": policy})
    return found.policy if isinstance(found, Network) else found


@pytest.mark.parametrize("policy", [None, {}, {"tokens": None}, {"paths": {}}, {"paths": None}])
def test_a_rule_that_is_missing_is_left_to_other_scopes(policy: object) -> None:
    assert _of_instance(policy) == _of_network(policy) == NO_RULES


def _values_of(rule: Rule) -> tuple[object, ...]:
    if rule.bounds is not None:
        least, most = rule.bounds
        return (least, most, None, least - 1, most + 1, -1, True, 1.5, "1", "", [], {})
    if rule.kind is bool:
        return (True, False, None, 1, 0, "true", "yes", "", 1.5, [], {})
    return ("off", "optional", "required", None, False, True, "OFF", "on", "", 0, 1, [], {})


_VALUES = {name: _values_of(rule) for name, rule in RULES.items() if rule.kind is not tuple}


_PATHS: tuple[object, ...] = (
    None,
    {},
    {"/": "deny"},
    {"/latest/user-data": "allow", "/nocloud": "optional", "/openstack/content": "required"},
    {f"/latest/{number}": "deny" for number in range(MOST_PATH_RULES)},
    {f"/latest/{number}": "deny" for number in range(MOST_PATH_RULES + 1)},
    {"/1.0/user-data": "deny"},
    {"/latest": "refuse"},
    {"/latest": False},
    {"/latest": {}},
    ["/latest"],
    "/latest",
    True,
)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, value) for key, values in _VALUES.items() for value in values),
        *(("paths", value) for value in _PATHS),
    ],
)
def test_records_take_what_settings_take(key: str, value: object) -> None:
    found = _of_instance({key: value})
    assert isinstance(found, Refused) or found == _of_network({key: value})
    try:
        settings = PolicyRulesSettings.model_validate({key: value}).rules()
    except ValidationError as error:
        assert isinstance(found, Refused)
        (problem,) = found.problems
        assert problem.field.startswith(f"policy.{key}")
        assert problem.hint or key == "paths"
        (finding,) = map(explain_finding, error.errors())
        if isinstance(value, dict) and len(value) == 1 and finding.field != "paths./latest":
            assert (finding.reason, finding.hint) == (problem.reason, problem.hint)
    else:
        assert found == settings
