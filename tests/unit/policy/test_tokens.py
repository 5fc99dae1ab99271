import pytest

from imdsproxy.core.tokens import (
    CURRENT,
    KEPT_KEYS,
    TokenKey,
    TokenKeysUnreadable,
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
        (f"{_KEYS[0].text}\n{_KEYS[0].text}\n", "line 2 has a key that is there already"),
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
