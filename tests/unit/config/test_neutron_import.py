"""Neutron's ini files, and the settings that they come to."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imdsproxy.config.describe import find_setting
from imdsproxy.config.load import load_settings, settings_by_origin
from imdsproxy.config.neutron_import import Imported, plan_import
from imdsproxy.config.neutron_ini import expand_value, parse_ini
from imdsproxy.config.neutron_options import NEUTRON_OPTIONS, Fate
from imdsproxy.config.schema import Settings
from imdsproxy.errors import ConfigInvalid, Problem

_TEXT = """\
# a comment
; another
[DEFAULT]
plain = value
  and more
# ends it
colon : a = b
equal=a : b
quoted = "  kept  "
single = 'a'
half = "a
empty =
plain = last

[Agent]
key = 1 # no comment
[ s ]
key = 2
"""


def _values(text: str) -> list[tuple[str, str, str, int]]:
    return [(one.section, one.name, one.value, one.line) for one in parse_ini(text, "f")]


def test_a_file_is_read_as_its_service_reads_it() -> None:
    assert _values(_TEXT) == [
        ("DEFAULT", "plain", "value\nand more", 4),
        ("DEFAULT", "colon", "a = b", 7),
        ("DEFAULT", "equal", "a : b", 8),
        ("DEFAULT", "quoted", "  kept  ", 9),
        ("DEFAULT", "single", "a", 10),
        ("DEFAULT", "half", '"a', 11),
        ("DEFAULT", "empty", "", 12),
        ("DEFAULT", "plain", "last", 13),
        ("agent", "key", "1 # no comment", 16),
        (" s ", "key", "2", 18),
    ]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_may_end_as_on_any_system(end: str) -> None:
    assert _values(f"[a]{end}b = 1{end}{end}c = 2{end}") == [("a", "b", "1", 2), ("a", "c", "2", 4)]


def test_every_line_that_cannot_be_read_is_told_without_what_it_says() -> None:
    text = "before = 1\n[]\n[open\n  stray\n[x]\nsecret word\n= secret\n: secret\nok = \x00secret\n"
    with pytest.raises(ConfigInvalid) as caught:
        parse_ini(f"{text}\n  an empty line ends a value", "/etc/x.ini")
    named = {1: "before", 9: "ok"}
    lines = (1, 2, 3, 4, 6, 7, 8, 9, 11)
    assert [(one.file, one.line, one.field) for one in caught.value.problems] == [
        ("/etc/x.ini", line, named.get(line, "the line")) for line in lines
    ]
    assert "secret" not in str(caught.value)
    assert "stray" not in str(caught.value)


@given(
    st.text()
    | st.text(st.sampled_from("[]=:#; \t\n\r\x0b\x85\u2028'\"ab"), max_size=60)
    | st.binary().map(lambda data: data.decode("latin-1"))
)
def test_any_text_is_read_or_refused_with_lines(text: str) -> None:
    try:
        options = parse_ini(text, "f")
    except ConfigInvalid as error:
        assert all(one.line for one in error.problems)  # noqa: PT017 - either way is right
        return
    assert all(one.name and one.section for one in options)


def test_a_value_may_refer_to_others() -> None:
    value = (
        r"$state_path/x ${state_path}x ${nested} $agent.host! 5$$ \$state_path $ 5 $ 100%s ${a-b}"
    )
    others = {"state_path": "/var", "nested": "$state_path/y", "agent.host": "h"}
    expanded = "/var/x /varx /var/y h! 5$ $state_path $ 5 $ 100%s ${a-b}"
    assert expand_value(value, others.get) == expanded


_REFUSED = Path(__file__).with_name("refused_neutron.txt").read_text(encoding="utf-8")
"""Neutron's files, two with `---` between them, each with the problems that they have."""

_SECRET = "metadata_proxy_shared_secret = topsecretvalue\n"
_NOVA = "[neutron]\nmetadata_proxy_shared_secret = {}\n"
_SECRET_FILE = Path("/etc/imdsproxy/nova.secret")
_SET = "nova.endpoint_sets.default"
_URL = f"{_SET}.endpoints[0].url"


def _import(
    *texts: str,
    names: Sequence[str] = (),
    server_name: str | None = None,
    agent_user: str = "neutron",
    behind_proxies: bool = True,
) -> Imported:
    """Import files named a.ini, b.ini and so on; a text without a section is in [DEFAULT]."""
    named = zip(names or [f"{one}.ini" for one in "abcdef"], texts, strict=False)
    files = [
        parse_ini(text if text.startswith("[") else f"[DEFAULT]\n{text}", name)
        for name, text in named
    ]
    return plan_import(
        files,
        _SECRET_FILE,
        server_name=server_name,
        agent_user=agent_user,
        behind_proxies=behind_proxies,
    )


def test_without_the_agents_proxies_neither_their_socket_nor_neutron_is_in_the_settings() -> None:
    text = _import(f"{_SECRET}state_path = /x\n", behind_proxies=False).text
    assert "nova:" in text
    assert "unix_listener" not in text
    assert "neutron:" not in text


def _settings(text: str, tmp_path: Path) -> dict[str, object]:
    """Each setting, and each part of an endpoint set, by its path."""
    config = tmp_path / "c.yaml"
    config.write_text(text)
    return {
        path: one["value"] for path, one in settings_by_origin(load_settings(config, {})).items()
    }


def _problems(
    *texts: str, server_name: str | None = None, agent_user: str = "neutron"
) -> list[Problem]:
    with pytest.raises(ConfigInvalid) as caught:
        _import(*texts, server_name=server_name, agent_user=agent_user)
    return list(caught.value.problems)


_CLIENT = "nova_client_cert = /c\nnova_client_priv_key ="
_NOVAS_OWN = "[DEFAULT]\nstate_path = /var/lib/nova\nhost = h\nmetadata_workers = x\n"
_AS_NOVA = _NOVAS_OWN + _NOVA.format("topsecretvalue")
_IN_NOVA = "[neutron]\nservice_metadata_proxy = {0}\n[api]\nlocal_metadata_per_cell = {0}"


@pytest.mark.parametrize(
    ("setting", "value", "texts"),
    [
        # The secret is enough: the rest has Neutron's defaults.
        (_URL, "http://127.0.0.1:8775", [""]),
        (f"{_SET}.secret_file", str(_SECRET_FILE), [""]),
        ("unix_listener.path", "/var/lib/neutron/metadata_proxy", [""]),
        (_URL, "http://[2001:db8::1]:8775", ["nova_metadata_host = 2001:db8::1"]),
        (
            _URL,
            "http://c:8775",
            ["nova_metadata_host = a", "nova_metadata_ip = b\nnova_metadata_ip = c"],
        ),
        (_URL, "http://a:8775", ["nova_metadata_host = a\nnova_metadata_ip = b"]),
        (f"{_SET}.verify", False, ["nova_metadata_insecure = On"]),
        (f"{_SET}.client_cert_file", None, [_CLIENT]),
        ("unix_listener.path", "/srv/metadata_proxy", ["state_path = /srv"]),
        (
            "unix_listener.path",
            "/srv/s",
            ["state_path = /srv\nmetadata_proxy_socket = $state_path/s"],
        ),
        ("unix_listener.path", "/var/lib/neutron/metadata_proxy", ["", _AS_NOVA]),
        # A guest is answered before its proxy gives up.
        ("nova.response_timeout_s", 30, [""]),
        ("nova.response_timeout_s", 1, ["[metadata_haproxy]\ntimeout_server = 1"]),
        ("nova.response_timeout_s", 98, ["[metadata_haproxy]\ntimeout_server = 100"]),
        ("nova.response_timeout_s", 600, ["[metadata_haproxy]\ntimeout_server = 9999"]),
    ],
)
def test_what_neutrons_files_say_arrives_in_the_settings(
    tmp_path: Path, setting: str, value: object, texts: list[str]
) -> None:
    imported = _import(_SECRET + texts[0], *texts[1:])
    assert _settings(imported.text, tmp_path)[setting] == value


@pytest.mark.parametrize(
    ("option", "fate", "texts"),
    [
        ("nova_client_cert", Fate.NONE, [_CLIENT]),
        ("nova_client_priv_key", Fate.NONE, [_CLIENT]),
        ("metadata_workers", None, ["", _AS_NOVA]),
        ("service_metadata_proxy", Fate.NONE, ["", _IN_NOVA.format("true")]),
        ("service_metadata_proxy", Fate.BY_HAND, ["", _IN_NOVA.format("false")]),
        ("local_metadata_per_cell", Fate.BY_HAND, ["", _IN_NOVA.format("true")]),
        ("local_metadata_per_cell", Fate.NONE, ["", _IN_NOVA.format("false")]),
    ],
)
def test_what_neutron_or_nova_does_without_an_option_is_not_to_be_done(
    option: str, fate: Fate | None, texts: list[str]
) -> None:
    report = _import(_SECRET + texts[0], *texts[1:]).report
    assert {one["option"]: one["fate"] for one in report["options"]}.get(option) == fate


@pytest.mark.parametrize(
    ("texts", "name", "shown_by"),
    [
        ((_SECRET, "[ovn]\novn_sb_connection = tcp:192.0.2.1:6642\n"), "", "ovn_sb_connection"),
        ((f"[ovn]\novn_sb_private_key = /k\n[DEFAULT]\n{_SECRET}",), "", "ovn_sb_private_key"),
        ((_SECRET,), "neutron_ovn_metadata_agent.ini", "metadata_proxy_shared_secret"),
        ((_SECRET,), "ovn_agent.ini", "metadata_proxy_shared_secret"),
        ((_SECRET,), "/etc/ovn/metadata_agent.ini", ""),
        ((_SECRET,), "noven.ini", ""),
        # Of Neutron's server, which is on hosts with other agents too.
        ((f"{_SECRET}[ovn]\novn_metadata_enabled = true\n",), "", ""),
        ((_SECRET, "[neutron]\nurl = x\n[ovn]\novn_sb_connection = x\n"), "", ""),
    ],
)
def test_the_path_is_taken_over_from_ovns_agent_which_has_to_run_on(
    tmp_path: Path, texts: tuple[str, ...], name: str, shown_by: str
) -> None:
    imported = _import(*texts, names=[name] if name else ())
    ovn = imported.report["ovn"]
    assert ("" if ovn is None else ovn["option"]) == shown_by
    taken_over = _settings(imported.text, tmp_path)["unix_listener.take_over"]
    assert taken_over is bool(shown_by)


def test_what_a_later_value_wins_over_is_reported() -> None:
    report = _import(
        f"{_SECRET}nova_metadata_host = a\n", "nova_metadata_ip = b\nnova_metadata_ip = c\n"
    ).report
    lost = [(one["file"], one["line"], one["by"]["line"]) for one in report["overridden"]]
    assert lost == [("a.ini", 3, 3), ("b.ini", 2, 3)]
    assert [
        one["why"][:33] for one in report["options"] if one["option"] == "nova_metadata_ip"
    ] == ["Of old, for `nova_metadata_host`."]
    same = (
        f"{_SECRET}metadata_proxy_socket = /var/lib/neutron/metadata_proxy\n",
        "metadata_proxy_socket = $state_path/metadata_proxy\n",
    )
    assert _import(*same).report["overridden"] == []
    assert _import("state_path = /x\n", _NOVA.format("a$$b")).secret == "a$b"
    nowhere = "external_pids = $none/x\n"
    assert _import(_SECRET + nowhere, nowhere).report["overridden"] == []


def test_neutrons_host_is_offered_for_the_list_of_ports(tmp_path: Path) -> None:
    text = _import(f"{_SECRET}host = compute-1\n").text
    # Both signs away from the last line, and the first one from the others.
    text = re.sub(r"^#(?=sources|  )", "", text, flags=re.MULTILINE).replace("# list_h", "list_h")
    wanted = {"enabled": True, "cloud": "CLOUD", "list_host": "compute-1"}
    found = _settings(text, tmp_path)
    assert {name: found[f"sources.neutron.{name}"] for name in wanted} == wanted


def test_an_option_that_looks_like_another_is_doubtful() -> None:
    report = _import(f"{_SECRET}nova_metadata_prot = 1\nmetadata-workers = 2\nl3_x = 3\n").report
    assert [(one["option"], one["near"]) for one in report["doubtful"]] == [
        ("nova_metadata_prot", "nova_metadata_port"),
        ("metadata-workers", "metadata_workers"),
    ]
    assert report["others"] == 3


@pytest.mark.parametrize("case", _REFUSED.split("\n\n"))
def test_what_neutron_or_imdsproxy_does_not_take_is_refused_with_file_and_line(case: str) -> None:
    texts, *wanted = case.split("\n=> ")
    problems = list(map(str, _problems(*texts.split("\n---\n"))))
    assert problems == [one.strip() for one in wanted]
    assert not any(secret in one for one in problems for secret in ("hush", "tush"))


def test_what_is_given_beside_the_files_is_checked_and_taken_over(tmp_path: Path) -> None:
    problems = _problems(_SECRET, agent_user="a b")
    assert [one.field for one in problems] == ["unix_listener.user", "unix_listener.group"]
    text = f"{_SECRET}nova_metadata_protocol = https\n"
    found = _settings(_import(text, server_name="nova.example.org").text, tmp_path)
    assert found[f"{_SET}.server_name"] == "nova.example.org"


def test_each_option_stands_once_and_has_a_default_that_neutron_takes_and_a_setting_there_is() -> (
    None
):
    names = [name for option in NEUTRON_OPTIONS for name in option.names]
    assert len(set(names)) == len(names)
    for option in NEUTRON_OPTIONS:
        assert option.why.endswith(".")
        worked_out = option.name in {"metadata_workers", "host"}  # by Neutron
        assert worked_out or option.accepts(option.default), option.name
        place = re.split(r"\.", option.becomes.replace("[0]", ""))
        steps: list[str | int] = []
        for step in place if option.becomes else ():
            steps += [step, 0] if step == "endpoints" else [step]
        assert find_setting(steps) is not None
        for word in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)`", option.why):
            assert find_setting(word.split(".")) is not None, word


_LIKELY = ("", "1", "443", "true", "/a", "https", "::1", "nova", "$state_path/x", "user", "4")
_VALUES = st.sampled_from(_LIKELY) | st.text(
    st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=20
)
_NAMES = st.sampled_from([one.names[0] for one in NEUTRON_OPTIONS if not one.secret])


@given(st.dictionaries(_NAMES, _VALUES, max_size=5))
def test_any_values_are_taken_over_or_refused(values: dict[tuple[str, str], str]) -> None:
    text = "".join(f"[{section}]\n{name} = {value}\n" for (section, name), value in values.items())
    try:
        imported = plan_import([parse_ini(f"[DEFAULT]\n{_SECRET}{text}", "f")], _SECRET_FILE)
    except ConfigInvalid as error:
        assert error.problems  # noqa: PT017 - either way is right
        return
    Settings.model_validate(imported.settings)
