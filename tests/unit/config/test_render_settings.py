from __future__ import annotations

import json
from pathlib import Path

from imdsproxy.config.load import load_settings
from imdsproxy.config.render import (
    render_sample,
    render_schema,
    render_settings,
    settings_by_origin,
)
from imdsproxy.config.schema import Settings
from imdsproxy.config.words import iterate_settings, render_value


def test_the_sample_loads_back_as_the_defaults(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(render_sample())

    loaded = load_settings(config, {})

    assert loaded.settings == Settings()
    assert set(loaded.origins) == {setting.path for setting in iterate_settings()}


def test_the_sample_says_what_each_setting_is_for() -> None:
    sample = " ".join(line.strip(" #") for line in render_sample().splitlines())

    for setting in iterate_settings():
        assert setting.description in sample


def test_no_line_of_the_sample_is_wider_than_a_page() -> None:
    assert max(len(line) for line in render_sample().splitlines()) <= 100


def test_what_show_prints_loads_back_equal(tmp_path: Path) -> None:
    loaded = load_settings(
        None,
        {
            "IMDSPROXY_METRICS__LISTEN": "null",
            "IMDSPROXY_ADMIN__MODE": "0600",
            "IMDSPROXY_PATHS__STATE_DIR": "/with blank/#: x",
            "IMDSPROXY_HAPROXY__BINARY": "null",
            "IMDSPROXY_RESOLVER__HOLD_S": "0.25",
        }
        | {"IMDSPROXY_HAPROXY__BINARY": "true"},
        default=tmp_path / "none",
    )
    config = tmp_path / "c.yaml"

    for with_origin in (False, True):
        config.write_text(render_settings(loaded, with_origin=with_origin))
        assert load_settings(config, {}).settings == loaded.settings


def test_show_says_where_a_value_was_written(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("log:\n  level: debug\n")
    loaded = load_settings(config, {"IMDSPROXY_LOG__FORMAT": "json"})

    lines = render_settings(loaded, with_origin=True).splitlines()

    assert f"# {config}:2" in next(line for line in lines if "level: debug" in line)
    assert "# IMDSPROXY_LOG__FORMAT" in next(line for line in lines if "format: json" in line)
    assert settings_by_origin(loaded)["log.level"] == {"value": "debug", "origin": f"{config}:2"}
    assert settings_by_origin(loaded)["haproxy.nbthread"] == {"value": 1, "origin": "default"}


def test_the_schema_describes_every_section() -> None:
    schema = json.loads(render_schema())

    assert set(schema["properties"]) == set(Settings.model_fields)
    assert schema["additionalProperties"] is False


def test_texts_that_yaml_would_misread_are_quoted() -> None:
    assert render_value("null") == '"null"'
    assert render_value("True") == '"True"'
    assert render_value("0660") == '"0660"'
    assert render_value("a: b") == '"a: b"'
    assert render_value("/run/imdsproxy") == "/run/imdsproxy"
