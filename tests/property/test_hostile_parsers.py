"""Whatever a file or a socket holds, who reads it gives back a value or raises what it says, and nothing else."""

import contextlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from imdsproxy.config.load import load_settings
from imdsproxy.config.strict_yaml import Decoded, decode_yaml
from imdsproxy.controller.policy_store import read_overrides
from imdsproxy.errors import ConfigError, HostRefused
from imdsproxy.model.policy import OperatorOverride
from imdsproxy.model.records import (
    Findings,
    Refused,
    parse_instance,
    parse_network,
    parse_records,
    render_record,
)
from imdsproxy.model.tokens import TokenKeysUnreadable, parse_token_keys
from imdsproxy.sources.file.record_file import decode_json

_FIXED: Final = settings(max_examples=300, derandomize=True, deadline=None, database=None)

_SCALARS: Final = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from((2**63, 2**64, -1, 10**40, 1e400, -0.0, float("nan"))),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(("10.0.0.5", "fe80::1%eth0", "::", "10.0.0.0/33", "/x", "..", "\0", "\ud800")),
    st.dates(),
    st.binary(max_size=4),
)

_SECTIONS: Final = "paths host haproxy documents resolver sources nova unix_listener log admin metrics policy tokens"
_SETTINGS: Final = (
    "listen endpoint tokens instances host networks enabled url endpoints endpoint_sets secret_file hold_s cache_mb "
    "maxconn level format path mode user"
)
_RECORD: Final = (
    "id name hostname ports ssh_keys tags user_data user_data_file vendor_data dialects listener subnets mtu extra "
    "policy created_at scope mac_check upstream"
)


def _trees(keys: str) -> st.SearchStrategy[Any]:
    """Anything that YAML may hold, its keys often those that are looked for."""
    names = st.one_of(*[st.sampled_from(keys.split())] * 4, st.text(max_size=5))
    return st.recursive(
        _SCALARS,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(names, inner, max_size=5)
        ),
        max_leaves=16,
    )


def _broken(text: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """A text with a piece of another one in place of a piece of its own, or as it is."""
    odd = st.text(
        st.sampled_from("\t\n\0 :-?[]{}&*!|>'\"%@`#,0x~.<=\ufeff\x85\u2028\ud800a"), max_size=8
    )

    def cut(whole: str, at: int, length: int, more: str) -> str:
        at %= len(whole) + 1
        return whole[:at] + more + whole[at + length :]

    return st.one_of(
        text, st.builds(cut, text, st.integers(0, 4_000), st.integers(0, 40), odd), odd
    )


def _in_file(content: bytes, read: Callable[[Path], object]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "file")
        path.write_bytes(content)
        read(path)


_TREES_OF_SETTINGS: Final = st.dictionaries(
    st.sampled_from(_SECTIONS.split()), _trees(_SETTINGS), max_size=4
)


@_FIXED
@given(text=_broken(_TREES_OF_SETTINGS.map(yaml.safe_dump)))
@example(text="policy: {host: {tokens: !!python/object:os.system x}}")
@example(text="a: &a [*a]")
@example(text="policy: &a {host: *a}")
@example(text="[" * 5_000)
@example(text="haproxy: {maxconn: " + "9" * 5_000 + "}")
@example(text="log: {level: 2020-13-45}")
@example(text="? [a]\n: b")
@example(text="\ud800: x")
@example(text="---\na: 1\n---\nb: 2\n")
@example(text="resolver: {hold_s: .nan}")
@example(text="<<: [1, 2]\n")
@example(text="policy: {instances: {1: {}, true: {}, null: {}}}")
def test_settings_are_read_or_refused_as_settings_are(text: str) -> None:
    def read(path: Path) -> None:
        with contextlib.suppress(ConfigError):
            load_settings(path, {})

    content = text.encode("utf-8", "surrogatepass")
    _in_file(content, read)
    _in_file(content[::2], read)


# Records

_RECORDS: Final = st.dictionaries(st.sampled_from(_RECORD.split()), _trees(_RECORD), max_size=6)


@given(_RECORDS | _trees(_RECORD))
@example({"id": "a", "name": "a", "ports": [{"network": "n", "addresses": ["\ud800"]}]})
@example({"id": "a", "name": "a", "created_at": 10**40})
@example({"id": "a", "name": "a", "user_data": {"base64": "\u0661==="}})
@example({"id": "n", "subnets": [{"cidr": "10.0.0.0/\u0662"}]})
def test_whatever_is_written_is_a_record_or_told_problems(record: object) -> None:
    for found in (
        parse_instance(record, (), Findings(read_file=lambda _field: b"x")),
        parse_network(record),
    ):
        if isinstance(found, Refused):
            assert found.problems
            for problem in found.problems:
                assert str(problem).encode()
                assert str(problem).isprintable()
        else:
            assert json.dumps(render_record(found))


@given(_broken(_RECORDS.map(lambda record: yaml.safe_dump({"instances": [record]}))) | st.text())
@example("instances: &a [*a]")
@example("[" * 5_000)
@example("{" * 5_000)
@example("instances: [{id: " + "9" * 5_000 + "}]")
@example('{"a": 1, "a": 2}')
@example('{"a": NaN, "b": 1e999}')
@example('{"a": "\\ud800"}')
def test_whatever_text_there_is_yaml_and_json_are_told_apart_from_garbage(text: str) -> None:
    for decoded in (decode_yaml(text), decode_json(text)):
        if isinstance(decoded, Decoded):
            parse_records(decoded.value, Findings(line_of=decoded.line_of), decoded.faults)


_JSON_VALUES: Final = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@example("\x85", None, "utf-8")
@given(_JSON_VALUES, st.sampled_from([None, 1, "\t"]), st.sampled_from(["ascii", "utf-8"]))
def test_json_is_decoded_as_the_standard_library_does_and_is_yaml_too(
    value: object, indent: int | str | None, codec: str
) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=codec == "ascii")
    decoded = decode_json(text)
    assert isinstance(decoded, Decoded)
    assert decoded.value == json.loads(text)
    assert not decoded.faults
    plain = json.dumps(value, ensure_ascii=False)
    other = decode_yaml(plain)
    # libyaml takes these for ends of lines.
    if isinstance(other, Decoded) and not other.faults and not set("\x85\u2028\u2029") & set(plain):
        assert other.value == value


# Secrets and what operators did


@_FIXED
@given(
    text=_broken(
        st.lists(st.binary(min_size=30, max_size=34).map(lambda key: f"{key!r}")).map("\n".join)
    )
)
@example(text="A" * 43 + "=\n" + "A" * 43 + "=")
@example(text="\u0661" * 43 + "=")
@example(text="A" * 42 + "B=")
def test_token_keys_are_read_or_refused_without_a_word_of_them(text: str) -> None:
    said = ""
    try:
        assert parse_token_keys(text)
    except TokenKeysUnreadable as error:
        said = str(error)
    assert not any(line in said for line in text.split() if len(line) > 8)


_OVERRIDES: Final = st.one_of(
    _trees("format instances a").map(lambda tree: json.dumps(tree, default=str)),
    st.dictionaries(st.text(max_size=4), _trees("a")).map(
        lambda told: json.dumps({"format": 1, "instances": told}, default=str)
    ),
)


@_FIXED
@given(text=_broken(_OVERRIDES))
@example(text="[" * 100_000)
@example(text='{"format": 1, "instances": {"a": [' + "9" * 5_000 + ", 0]}}")
@example(text='{"format": 1, "instances": {"a": [1e999, 0]}}')
@example(text='{"format": 1, "instances": {"a": [true, 0]}}')
@example(text='{"format": 1, "instances": {"a": 1}}')
@example(text='{"format": 1, "instances": null}')
@example(text="null")
def test_overrides_are_read_or_refused_as_damaged(text: str) -> None:
    def read(path: Path) -> None:
        with contextlib.suppress(HostRefused):
            overrides, departed = read_overrides(path)
            assert all(type(at) is int for at in departed.values())
            for one in overrides.values():
                assert type(one) is OperatorOverride
                assert min(one.epoch, one.reopened_at) >= 0

    _in_file(text.encode("utf-8", "surrogatepass"), read)
