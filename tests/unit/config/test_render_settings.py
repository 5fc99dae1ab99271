from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imdsproxy.config.describe import iterate_settings
from imdsproxy.config.load import load_settings
from imdsproxy.config.render import (
    render_sample,
    render_schema,
    render_settings,
    settings_by_origin,
)
from imdsproxy.config.schema import Settings
from imdsproxy.config.strict_yaml import parse_yaml, render_value


def test_the_sample_says_what_each_setting_is_for() -> None:
    sample = " ".join(line.strip(" #") for line in render_sample().splitlines())

    for setting in iterate_settings():
        assert setting.description in sample
        assert f"Takes {setting.takes}." in sample
    assert max(map(len, render_sample().splitlines())) <= 100


def test_the_sample_shows_an_endpoint_set_that_can_be_taken_over(tmp_path: Path) -> None:
    head, marker, rest = render_sample().partition(
        "  # For example, with every setting that it can have:\n"
    )
    commented, _, tail = rest.partition("\n\n")
    assert marker
    assert head.endswith("  endpoint_sets: {}\n")
    example = [line.replace("# ", "", 1) for line in commented.splitlines()]
    config = tmp_path / "c.yaml"
    config.write_text(head.removesuffix("  endpoint_sets: {}\n") + "\n".join(example) + "\n" + tail)

    sets = load_settings(config, {}).settings.nova.endpoint_sets

    assert [str(one.url) for one in sets["default"].endpoints] == ["http://192.0.2.10:8775"]
    given = {path.rpartition(".")[2] for path in settings_by_origin(load_settings(config, {}))}
    assert {
        setting.path.rpartition(".")[2] for setting in iterate_settings() if setting.inner
    } <= given


def test_settings_are_shown_as_they_load(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(
        "nova:\n"
        "  endpoint_sets:\n"
        "    default:\n"
        "      endpoints:\n"
        "        - url: http://192.0.2.10\n"
        "        - {url: 'http://[2001:db8::5]', secret: next}\n"
        "      secret_file: '/with blank/#: x'\n"
        "      next_secret_file: /next\n"
        "      networks: ['null', '12', a-b]\n"
        "    'true': {endpoints: [{url: http://nova}], secret_file: /x}\n"
        "    '12': {endpoints: [{url: http://nova}], secret_file: /x}\n"
        "metrics: {listen: null}\n"
        "admin: {mode: '0600'}\n"
        "haproxy: {binary: 'true'}\n"
        "resolver: {hold_s: 0.25}\n"
    )
    loaded = load_settings(config, {})
    again = tmp_path / "again.yaml"

    for with_origin in (False, True):
        again.write_text(render_settings(loaded, with_origin=with_origin))
        assert load_settings(again, {}).settings == loaded.settings
    lines = render_settings(loaded, with_origin=True).splitlines()
    assert '        - url: "http://192.0.2.10:8775"' in "\n".join(lines)
    assert next(line for line in lines if "secret: next" in line).endswith(f"# {config}:6")
    assert next(line for line in lines if "networks: [" in line).endswith(f"# {config}:9")
    told = settings_by_origin(loaded)["nova.endpoint_sets.default.endpoints[1].secret"]
    assert told == {"value": "next", "origin": f"{config}:6"}
    assert settings_by_origin(loaded)["haproxy.nbthread"] == {"value": 1, "origin": "default"}


def test_the_schema_describes_every_section() -> None:
    schema = json.loads(render_schema())

    assert set(schema["properties"]) == set(Settings.model_fields)
    assert schema["additionalProperties"] is False
    sets = schema["$defs"]["NovaSettings"]["properties"]["endpoint_sets"]
    (inner,) = sets["patternProperties"].values()
    assert inner == {"$ref": "#/$defs/EndpointSetSettings"}
    assert schema["$defs"]["EndpointSetSettings"]["required"] == ["endpoints", "secret_file"]


TEXTS = st.text(st.characters(codec="utf-8"))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=20,
)


@given(VALUES)
def test_a_value_is_read_as_it_was_written(value: object) -> None:
    assert parse_yaml(f"key: {render_value(value)}", "f").value == {"key": value}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((text, f'"{text}"') for text in ("null", "True", "0660", "a: b")),
        ("/run/imdsproxy", "/run/imdsproxy"),
        ({}, "{}"),
        ([], "[]"),
        (("a", 1, None), '["a", 1, null]'),
        ({"a b": ["x"], "c": {"d": True}}, '{"a b": ["x"], c: {d: true}}'),
    ],
)
def test_a_value_is_written_on_one_line_and_quoted_where_yaml_would_misread_it(
    value: object, text: str
) -> None:
    assert render_value(value) == text
