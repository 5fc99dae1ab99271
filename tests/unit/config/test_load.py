"""Settings as they are loaded, refused, compared, missed and shown."""

import copy
import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imdsproxy.config.changes import SettingChange, diff_settings, refuse_dropped
from imdsproxy.config.describe import iterate_settings, render_sample, render_schema, walk_values
from imdsproxy.config.load import Loaded, load_settings, render_settings, settings_by_origin
from imdsproxy.config.schema import Settings
from imdsproxy.config.section import Change, Endpoint, parse_endpoint
from imdsproxy.config.strict_yaml import parse_yaml, render_value
from imdsproxy.errors import ConfigInvalid, ConfigUnreadable, Problem, SettingsDropped
from imdsproxy.model.wire import ONE_IN

_REFUSED = Path(__file__).with_name("refused_settings.txt").read_text(encoding="utf-8")
"""Settings, after variables if there are some, each with the problems that they have, by their lines."""


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _origins(loaded: Loaded) -> dict[str, str]:
    """Where each setting was written, as `config show` has it."""
    shown = settings_by_origin(loaded)
    origins = {path: str(one["origin"]) for path, one in shown.items()}
    return {path: origin for path, origin in origins.items() if origin != "default"}


def _problems(config: Path | None, environment: dict[str, str] | None = None) -> list[Problem]:
    with pytest.raises(ConfigInvalid) as caught:
        load_settings(config, environment or {}, default=Path("/nonexistent/x.yaml"))
    return list(caught.value.problems)


def test_without_any_file_or_in_an_empty_one_all_is_default(tmp_path: Path) -> None:
    for config in (None, _write(tmp_path / "c.yaml", "# nothing\n")):
        loaded = load_settings(config, {"PATH": "/bin"}, default=tmp_path / "none.yaml")
        assert loaded.settings == Settings()
        assert _origins(loaded) == {}
        assert loaded.settings.store_path == Path("/var/lib/imdsproxy/store.sqlite")
        assert loaded.settings.admin_socket == Path("/run/imdsproxy/admin.sock")
    with pytest.raises(ConfigUnreadable, match="No such file"):
        load_settings(tmp_path / "none.yaml", {})


def test_later_files_and_the_environment_win(tmp_path: Path) -> None:
    config = _write(
        tmp_path / "c.yaml", "haproxy: {nbthread: 2, cache_mb: 8}\nlog: {level: error}\n"
    )
    _write(tmp_path / "conf.d" / "20.yaml", "haproxy:\n  nbthread: 4\n")
    _write(tmp_path / "conf.d" / "10.yaml", "haproxy:\n  nbthread: 3\n  maxconn: 9\n")
    _write(tmp_path / "conf.d" / ".hidden.yaml", "haproxy: {nbthread: 9}\n")
    _write(tmp_path / "conf.d" / "readme.txt", "not read")

    environment = {"IMDSPROXY_LOG__LEVEL": "debug", "IMDSPROXY_METRICS__LISTEN": "[::1]:99"}
    loaded = load_settings(config, environment)

    haproxy = loaded.settings.haproxy
    assert (haproxy.nbthread, haproxy.maxconn, haproxy.cache_mb) == (4, 9, 8)
    assert (loaded.settings.log.level, loaded.settings.metrics.listen) == (
        "debug",
        Endpoint("::1", 99),
    )
    assert _origins(loaded) == {
        "haproxy.nbthread": f"{tmp_path}/conf.d/20.yaml:2",
        "haproxy.cache_mb": f"{config}:1",
        "haproxy.maxconn": f"{tmp_path}/conf.d/10.yaml:3",
        "log.level": "IMDSPROXY_LOG__LEVEL",
        "metrics.listen": "IMDSPROXY_METRICS__LISTEN",
    }


def test_every_setting_can_be_overridden_by_its_variable(tmp_path: Path) -> None:
    settings = [setting for setting in iterate_settings() if not setting.inner]
    defaults = {node.path: node.value for node in walk_values(Settings().model_dump(mode="json"))}
    values = {
        setting.variable: "null" if (value := defaults[setting.path]) is None else str(value)
        for setting in settings
    }

    loaded = load_settings(None, values, default=tmp_path / "none.yaml")

    assert loaded.settings == Settings()
    assert set(_origins(loaded)) == {setting.path for setting in settings}


_TAKEN = """\
nova:
  endpoint_sets:
    default:
      {endpoints: [{url: http://nova}, {url: 'http://[::1]', secret: next}], secret_file: /x, next_secret_file: /y,
       ca_file: /ca, client_cert_file: /c, client_key_file: /k, host: 'n:1'}
    named: {endpoints: [{url: 'https://[::1]'}], secret_file: /x, server_name: nova, networks: [n, n]}
    unverified: {endpoints: [{url: 'https://[::1]'}], secret_file: /x, verify: false}
    plain: {endpoints: [{url: http://nova}], secret_file: /x, verify: true}
sources: {sqlite: {enabled: false}, neutron: {enabled: true, endpoint: 'http://[::1]:9696'}}
"""


def test_settings_that_go_together_are_taken(tmp_path: Path) -> None:
    assert load_settings(_write(tmp_path / "c.yaml", _TAKEN), {}).settings.nova.endpoint_sets


@pytest.mark.parametrize("case", _REFUSED.split("\n\n"))
def test_a_problem_has_its_line_and_says_what_would_be_right(tmp_path: Path, case: str) -> None:
    whole, *wanted = case.split("\n=> ")
    variables = [line for line in whole.splitlines() if line.startswith("IMDSPROXY_")]
    environment = dict(line.split("=", 1) for line in variables)
    config = _write(tmp_path / "c.yaml", whole.removeprefix("\n".join(variables)))
    problems = map(str, _problems(config, environment))
    found = [problem.removeprefix(f"{config}:") for problem in problems]
    assert found == [" ".join(one.split()) for one in wanted]


_SETS = """\
nova:
  endpoint_sets:
    default:
      endpoints:
        - url: http://192.0.2.10
        - {url: "http://[2001:db8::5]", secret: next}
      secret_file: /etc/current
      next_secret_file: /etc/next
"""


def test_a_list_that_is_replaced_takes_its_lines_along(tmp_path: Path) -> None:
    first = _SETS.replace("url: http://192.0.2.10\n", "{url: http://nova, secret: current}\n")
    config = _write(tmp_path / "c.yaml", first)
    later = "nova: {endpoint_sets: {default: {endpoints: [{url: http://nova}]}}}\n"
    _write(tmp_path / "conf.d" / "1.yaml", later)
    loaded = load_settings(config, {})
    (endpoint,) = loaded.settings.nova.endpoint_sets["default"].endpoints
    assert endpoint.secret == "current"
    inside = {path: one for path, one in _origins(loaded).items() if ".endpoints[" in path}
    assert inside == {"nova.endpoint_sets.default.endpoints[0].url": f"{tmp_path}/conf.d/1.yaml:1"}


def test_endpoint_sets_in_the_environment_are_merged_over_the_files(tmp_path: Path) -> None:
    config = _write(tmp_path / "c.yaml", _SETS)
    default = {"endpoints": [{"url": "http://192.0.2.99:1"}], "next_secret_file": None}
    cell1 = {"endpoints": [{"url": "https://nova"}], "secret_file": "/etc/é", "projects": ["p1"]}
    variable = "IMDSPROXY_NOVA__ENDPOINT_SETS"
    text = json.dumps({"default": default, "cell1": cell1})
    shown = settings_by_origin(load_settings(config, {variable: text}))
    for path, value, origin in (
        ("default.endpoints[0].url", "http://192.0.2.99:1", variable),
        ("default.secret_file", "/etc/current", f"{config}:7"),
        ("cell1.secret_file", "/etc/é", variable),
        ("cell1.projects", ["p1"], variable),
    ):
        assert shown[f"nova.endpoint_sets.{path}"] == {"value": value, "origin": origin}


def test_several_unreadable_files_are_told_together(tmp_path: Path) -> None:
    config = _write(tmp_path / "c.yaml", "a: [")
    _write(tmp_path / "conf.d" / "1.yaml", "log: {level: info, level: info}")
    (tmp_path / "conf.d" / "2.yaml").write_bytes(b"\xff")

    with pytest.raises(ConfigUnreadable) as caught:
        load_settings(config, {})

    for text in ("3 files", "c.yaml", "appears twice", "not UTF-8"):
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        *((text, " holds no sections") for text in ("- 1", "word", "5")),
        *((text, ":1 is not YAML") for text in ("a: b: c", "\x00", "a: *nowhere\n")),
        *((text, ":2 is not YAML") for text in ("a: [1", "a: 'x\n", "a: 1\n---\nb: 2\n")),
        *((text, ":2 is not YAML") for text in ("a: 1\nb: \x01\n", "a: 1\n\tb: 2\n")),
        ("a: 1\nb: [\nc: }\n", ":3 is not YAML"),
        ("[" * 200 + "]" * 200, ":1 is nested deeper than 100 levels"),
    ],
)
def test_what_is_not_yaml_or_has_no_sections_is_unreadable(
    tmp_path: Path, text: str, reason: str
) -> None:
    config = _write(tmp_path / "c.yaml", text)
    with pytest.raises(ConfigUnreadable, match=re.escape(f"{config}{reason}")):
        load_settings(config, {})
    (problem,) = _problems(None, {"IMDSPROXY_NOVA__ENDPOINT_SETS": text})
    assert (problem.file, problem.line) == ("IMDSPROXY_NOVA__ENDPOINT_SETS", None)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("127.0.0.1", "no port"),
        ("127.0.0.1:", "no port"),
        ("127.0.0.1:x", "no port"),
        ("127.0.0.1:0", "not a TCP port"),
        ("127.0.0.1:65536", "not a TCP port"),
        ("localhost:80", "not an IP address"),
        ("::1:80", "brackets"),
        ("[127.0.0.1]:80", "brackets"),
        ("169.254.169.254:80", "link-local"),
        ("[fe80::a9fe:a9fe]:80", "link-local"),
        ("0.0.0.0:80", "everywhere"),
        ("[::]:80", "everywhere"),
        ("224.0.0.1:80", "multicast"),
        ("127.0.0.1:²", "no port"),
    ],
)
def test_what_guests_could_reach_or_nobody_is_refused(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_endpoint(text)


_FULL = "policy: {host: {tokens: required, paths: {/latest/a: deny}}, networks: {n: {burst: 9}}}\n"


def _load(path: Path, text: str) -> Loaded:
    path.write_text(text)
    return load_settings(path, {})


@pytest.mark.parametrize(
    ("text", "empty", "blank"),
    [
        *((text, True, True) for text in ("", " \n\n")),
        *((text, True, False) for text in ("# a comment\n", "---\n", "null\n")),
        *((text, False, False) for text in ("{}\n", "haproxy: {}\n")),
    ],
)
def test_only_a_blank_file_is_refused_at_a_start_and_always(
    tmp_path: Path, text: str, *, empty: bool, blank: bool
) -> None:
    config = tmp_path / "c.yaml"
    before, loaded = _load(config, _FULL), _load(config, text)
    assert (config in loaded.empty, config in loaded.blank) == (empty, blank)
    for known in (None, before):
        with pytest.raises(SettingsDropped, match="is blank") if blank else nullcontext():
            refuse_dropped(known, loaded, allowed=known is not None)
    refuse_dropped(None, load_settings(Path("/dev/null"), {}))


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("{}\n", "every policy"),
        ("policy: {host: {paths: {}}}\n", "every policy"),
        ("policy: {host: {tokens: required}}\n", "every `deny`"),
        ("policy: {networks: {n: {burst: 9}}}\n", "every `deny`"),
        ("# a comment\n", "has no settings any more"),
        # Changed or moved is not missing.
        ("policy: {host: {paths: {/latest/a: allow}}}\n", ""),
        ("policy: {networks: {n: {paths: {/latest/b: deny}}}}\n", ""),
        ("policy: {host: {paths: {/latest/a: deny}}}\n", ""),
    ],
)
def test_what_is_missing_is_named_and_refused_unless_it_is_allowed(
    tmp_path: Path, text: str, missing: str
) -> None:
    before = _load(tmp_path / "c.yaml", _FULL)
    after = _load(tmp_path / "c.yaml", text)
    with pytest.raises(SettingsDropped, match=missing) if missing else nullcontext():
        refuse_dropped(before, after)
    refuse_dropped(before, after, allowed=True)


SETTINGS = {setting.path: setting for setting in iterate_settings()}
SET = {"endpoints": [{"url": "http://192.0.2.10:8775"}], "secret_file": "/x.secret"}
OTHER = {"endpoints": [{"url": "https://nova:1"}], "secret_file": "/x.secret", "verify": False}
DENY = {"/latest/user-data": "deny"}


def _settings(values: dict[str, Any]) -> Settings:
    return Settings.model_validate(copy.deepcopy(values), strict=False)


def _dumped(settings: Settings, path: str) -> object:
    found: Any = settings.model_dump(mode="json")
    for step in path.split("."):
        found = found.get(step) if isinstance(found, dict) else None
    return found


@pytest.mark.parametrize(
    ("before", "after", "changes"),
    [
        ({}, {}, {}),
        ({}, {"namespace_proxy": {"debug": True}}, {"namespace_proxy.debug": Change.NOTHING}),
        ({}, {"log": {"level": "debug"}}, {"log.level": Change.LIVE}),
        ({}, {"policy": {"host": {"paths": DENY}}}, {"policy.host.paths": Change.LIVE}),
        ({}, {"metrics": {"haproxy_listen": None}}, {"metrics.haproxy_listen": Change.RELOAD}),
        ({}, {"paths": {"runtime_dir": "/x"}}, {"paths.runtime_dir": Change.RESTART}),
        # What comes or goes by its name is one change, what stays is compared setting by setting.
        ({}, {"policy": {"networks": {"x": {"burst": 9}}}}, {"policy.networks.x": Change.LIVE}),
        (
            {},
            {"nova": {"endpoint_sets": {"default": SET}}},
            {"nova.endpoint_sets.default": Change.RELOAD},
        ),
        (
            {"nova": {"endpoint_sets": {"default": SET}}},
            {"nova": {"endpoint_sets": {"default": OTHER}}},
            {
                "nova.endpoint_sets.default.endpoints": Change.RELOAD,
                "nova.endpoint_sets.default.verify": Change.RELOAD,
            },
        ),
    ],
)
def test_each_setting_that_differs_says_what_its_change_takes(
    before: dict[str, Any], after: dict[str, Any], changes: dict[str, Change]
) -> None:
    old, new = _settings(before), _settings(after)
    for one, other in ((old, new), (new, old)):
        assert diff_settings(one, other) == tuple(
            SettingChange(path, _dumped(one, path), _dumped(other, path), change)
            for path, change in changes.items()
        )


def test_the_share_of_reads_that_are_counted_is_the_one_in_the_description() -> None:
    assert f"one read in {ONE_IN} by chance" in SETTINGS["tokens.count_reads"].description


def test_the_sample_says_what_each_setting_is_for() -> None:
    sample = " ".join(line.strip(" #") for line in render_sample().splitlines())

    for setting in iterate_settings():
        assert len(setting.description) > 15
        assert setting.description.endswith(".")
        assert setting.takes
        assert "^" not in setting.takes, "a pattern says nothing to most people"
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
        setting.path.rpartition(".")[2]
        for setting in iterate_settings()
        if setting.inner and setting.path.startswith("nova.")
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
def test_a_value_is_written_on_one_line_and_read_as_it_was_written(value: object) -> None:
    written = render_value(value)
    assert len(written.split("\n")) == 1
    assert parse_yaml(f"key: {written}", "f").value == {"key": value}
