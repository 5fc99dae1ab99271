import hashlib
import hmac
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imdsproxy.haproxy.rules.maps import plan_table_changes
from imdsproxy.model.entities import InstanceId
from imdsproxy.model.tokens import (
    CURRENT,
    KEPT_KEYS,
    TokenKey,
    TokenKeysUnreadable,
    instance_key,
    parse_key_map,
    parse_token_keys,
    render_key_map,
    render_token_keys,
    rotate_token_keys,
)

_KEYS = tuple(TokenKey(bytes([number]) * 32) for number in range(5))


def test_keys_are_read_as_they_were_written() -> None:
    assert parse_token_keys(render_token_keys(_KEYS)) == _KEYS


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no key"),
        ("# only words\n\n", "no key"),
        ("short\n", "line 1"),
        (f"\n{_KEYS[0].text}x\n", "line 2"),
        (f"{_KEYS[0].text}\n{_KEYS[0].text}\n", "line 2 repeats an earlier key"),
    ],
)
def test_a_file_without_keys_is_refused_and_none_of_it_is_told(text: str, why: str) -> None:
    with pytest.raises(TokenKeysUnreadable, match=why) as refused:
        parse_token_keys(text)
    assert _KEYS[0].text not in str(refused.value)


def test_a_key_of_another_length_is_none() -> None:
    with pytest.raises(ValueError, match="32 bytes, not 31"):
        TokenKey(b"x" * 31)


def test_a_keys_name_is_of_its_bytes_and_does_not_show_them() -> None:
    assert TokenKey(b"\0" * 32).kid == _KEYS[0].kid
    assert len({key.kid for key in _KEYS}) == len(_KEYS)
    assert _KEYS[1].text not in repr(_KEYS[1])
    assert "x01" not in repr(_KEYS[1])


def test_a_fresh_key_is_in_force_and_the_last_ones_are_believed() -> None:
    keys = rotate_token_keys(_KEYS[:3], _KEYS[4])
    assert keys == (_KEYS[4], _KEYS[0], _KEYS[1])
    assert len(keys) == KEPT_KEYS
    assert render_key_map(keys) == {
        CURRENT: _KEYS[4].kid,
        _KEYS[4].kid: _KEYS[4].text,
        _KEYS[0].kid: _KEYS[0].text,
        _KEYS[1].kid: _KEYS[1].text,
    }


# Of a fleet's instances

_IDS = ("i-1", "i-2", "i-11", "current", "a")
_OF_INSTANCES = st.dictionaries(
    st.sampled_from(_IDS).map(InstanceId),
    st.permutations(_KEYS).flatmap(
        lambda keys: st.integers(1, 4).map(lambda count: tuple(keys[:count]))
    ),
)


def test_an_instances_key_is_the_hmac_of_its_id_and_differs_from_every_other() -> None:
    made = instance_key(_KEYS[0], "i-1")
    expected = hmac.new(bytes(32), b"imdsproxy instance key|i-1", hashlib.sha256).digest()
    assert made == TokenKey(expected)
    others = {instance_key(key, name) for key in _KEYS for name in _IDS}
    assert len(others) == len(_KEYS) * len(_IDS)


@given(_OF_INSTANCES)
def test_keys_of_instances_are_read_out_of_the_map_as_they_were_written(
    of_instances: Mapping[InstanceId, tuple[TokenKey, ...]],
) -> None:
    entries = render_key_map(_KEYS[:2], of_instances)
    assert parse_key_map(entries) == of_instances
    assert len(entries) == 3 + sum(len(own) + 1 for own in of_instances.values())
    own = {name: one for name, one in entries.items() if "|" not in name}
    assert own == render_key_map(_KEYS[:2])


@given(_OF_INSTANCES, _OF_INSTANCES)
def test_at_each_step_from_one_map_to_the_next_the_name_in_force_is_that_of_a_key(
    before: Mapping[InstanceId, tuple[TokenKey, ...]],
    after: Mapping[InstanceId, tuple[TokenKey, ...]],
) -> None:
    table = render_key_map(_KEYS[:2], before)
    wanted = render_key_map(_KEYS[1:3], after)
    changes = plan_table_changes(table, wanted)
    steps = [*changes.added, *changes.changed, *((name, None) for name in changes.removed)]
    for name, value in steps:
        if value is None:
            del table[name]
        else:
            table[name] = value
        for one, kid in table.items():
            if one.startswith(CURRENT):
                assert f"{kid}{one.removeprefix(CURRENT)}" in table
    assert table == wanted
