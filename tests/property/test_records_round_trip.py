from __future__ import annotations

import json

import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from imdsproxy.config.strict_yaml import Decoded, decode_yaml
from imdsproxy.core.model import Instance, Network
from imdsproxy.core.records import (
    Findings,
    Refused,
    parse_instance,
    parse_network,
    parse_records,
    render_record,
)
from imdsproxy.sources.file.record_file import decode_json
from support.record_strategies import instances, networks


@given(instances, networks)
def test_records_come_back_from_json_as_they_were(instance: Instance, network: Network) -> None:
    document = {"networks": [render_record(network)], "instances": [render_record(instance)]}
    records = parse_records(json.loads(json.dumps(document)))
    assert records.instances == [instance]
    assert records.networks == [network]


_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.text(st.characters())
    | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
    ),
    max_leaves=10,
)
_keys = st.sampled_from(
    [
        *("id", "name", "hostname", "ports", "ssh_keys", "tags", "user_data", "user_data_file"),
        *("vendor_data", "dialects", "listener", "subnets", "mtu", "extra"),
        *("policy", "created_at", "scope", "mac_check", "upstream"),
    ]
)
_records = st.dictionaries(_keys, _values, max_size=6) | _values


@given(_records)
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


_odd = st.text(st.sampled_from("\t\n\0 :-?[]{}&*!|>'\"%@`#,0x~.<=\ufeff\x85\u2028a"), max_size=30)


@given(st.text() | _odd | _records.map(lambda record: yaml.safe_dump({"instances": [record]})))
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


_json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@example("\x85", None, "utf-8")
@given(_json_values, st.sampled_from([None, 1, "\t"]), st.sampled_from(["ascii", "utf-8"]))
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
