from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imdsproxy.config.describe import find_setting
from imdsproxy.config.load import load_settings
from imdsproxy.config.neutron_import import Imported, plan_import
from imdsproxy.config.neutron_options import NEUTRON_OPTIONS, Fate
from imdsproxy.config.render import settings_by_origin
from imdsproxy.config.schema import Settings
from imdsproxy.core.neutron_ini import parse_ini
from imdsproxy.errors import ConfigInvalid, Problem

_SECRET = "metadata_proxy_shared_secret = topsecretvalue\n"
_NOVA = "[neutron]\nmetadata_proxy_shared_secret = {}\n"
_SECRET_FILE = Path("/etc/imdsproxy/nova.secret")
_SET = "nova.endpoint_sets.default"
_URL = f"{_SET}.endpoints[0].url"


def _import(*texts: str, names: Sequence[str] = (), **given: str) -> Imported:
    """Import files named a.ini, b.ini and so on; a text without a section is in [DEFAULT]."""
    named = zip(names or [f"{one}.ini" for one in "abcdef"], texts, strict=False)
    files = [
        parse_ini(text if text.startswith("[") else f"[DEFAULT]\n{text}", name)
        for name, text in named
    ]
    return plan_import(files, _SECRET_FILE, **given)


def _settings(text: str, tmp_path: Path) -> dict[str, object]:
    """Each setting, and each part of an endpoint set, by its path."""
    config = tmp_path / "c.yaml"
    config.write_text(text)
    return {
        path: one["value"] for path, one in settings_by_origin(load_settings(config, {})).items()
    }


def _problems(*texts: str, **given: str) -> list[Problem]:
    with pytest.raises(ConfigInvalid) as caught:
        _import(*texts, **given)
    return list(caught.value.problems)


def _fates(imported: Imported) -> dict[str, str]:
    return {one["option"]: one["fate"] for one in imported.report["options"]}


_EVERYTHING = (
    f"{_SECRET}nova_metadata_host = 2001:db8::1\nnova_metadata_port = 443\n"
    "nova_metadata_protocol = https\nnova_metadata_insecure = On\nauth_ca_cert = /ca\n"
    "nova_client_cert = /c\nnova_client_priv_key = /k\nstate_path = /state\n"
    "metadata_proxy_socket = $state_path/s\nmetadata_proxy_socket_mode = all\n"
    "metadata_proxy_user = 99\nmetadata_proxy_group = www-data\n"
    "[metadata_haproxy]\ntimeout_server = 100\n"
)
_NOVAS_OWN = "[DEFAULT]\nstate_path = /var/lib/nova\nhost = h\nmetadata_workers = x\n"


@pytest.mark.parametrize(
    ("texts", "settings"),
    [
        (  # The secret is enough: the rest has Neutron's defaults.
            [_SECRET],
            {
                _URL: "http://127.0.0.1:8775",
                f"{_SET}.verify": True,
                f"{_SET}.client_cert_file": None,
                "unix_listener.enabled": True,
                "unix_listener.path": "/var/lib/neutron/metadata_proxy",
                "unix_listener.user": "neutron",
                "unix_listener.group": "neutron",
                "nova.response_timeout_s": 30,
                "sources.neutron.enabled": False,
            },
        ),
        (
            [_EVERYTHING],
            {
                _URL: "https://[2001:db8::1]:443",
                f"{_SET}.verify": False,
                f"{_SET}.ca_file": "/ca",
                f"{_SET}.client_cert_file": "/c",
                f"{_SET}.client_key_file": "/k",
                f"{_SET}.secret_file": str(_SECRET_FILE),
                "nova.response_timeout_s": 98,
                "unix_listener.path": "/state/s",
                "unix_listener.mode": "all",
                "unix_listener.proxy_user": "99",
                "unix_listener.proxy_group": "www-data",
            },
        ),
        ([f"{_SECRET}state_path = /srv"], {"unix_listener.path": "/srv/metadata_proxy"}),
        # A guest is answered before its proxy gives up.
        *(
            (
                [f"{_SECRET}[metadata_haproxy]\ntimeout_server = {timeout}\n"],
                {"nova.response_timeout_s": seconds},
            )
            for timeout, seconds in (("1", 1), ("3", 1), ("32", 30), ("9999", 600))
        ),
        (
            [f"{_SECRET}nova_metadata_host = a", "nova_metadata_ip = b\nnova_metadata_ip = c"],
            {_URL: "http://c:8775"},
        ),
        (
            [f"{_SECRET}nova_client_cert = /c\nnova_client_priv_key =\n"],
            {f"{_SET}.client_cert_file": None, f"{_SET}.client_key_file": None},
        ),
        (
            [_SECRET, _NOVAS_OWN + _NOVA.format("topsecretvalue")],
            {"unix_listener.path": "/var/lib/neutron/metadata_proxy"},
        ),
    ],
)
def test_what_neutrons_files_say_arrives_in_the_settings(
    tmp_path: Path, texts: list[str], settings: dict[str, object]
) -> None:
    found = _settings(_import(*texts).text, tmp_path)
    assert {path: found[path] for path in settings} == settings


def test_every_option_that_has_an_equivalent_is_reported_as_taken_over() -> None:
    taken = {name for name, fate in _fates(_import(_EVERYTHING)).items() if fate == Fate.TAKEN}
    assert taken == {
        option.name
        for option in NEUTRON_OPTIONS
        if option.fate is Fate.TAKEN and option.section != "neutron"
    }


@pytest.mark.parametrize(
    ("texts", "fates"),
    [
        (
            [f"{_SECRET}nova_client_cert = /c\nnova_client_priv_key =\n"],
            {"nova_client_cert": Fate.NONE, "nova_client_priv_key": Fate.NONE},
        ),
        ([_SECRET, _NOVAS_OWN + _NOVA.format("topsecretvalue")], {"metadata_workers": None}),
        *(
            (
                [
                    _SECRET,
                    f"[neutron]\nservice_metadata_proxy = {value}\n[api]\nlocal_metadata_per_cell = {value}",
                ],
                dict(
                    zip(("service_metadata_proxy", "local_metadata_per_cell"), fates, strict=True)
                ),
            )
            for value, *fates in (
                ("true", Fate.NONE, Fate.BY_HAND),
                ("false", Fate.BY_HAND, Fate.NONE),
            )
        ),
    ],
)
def test_what_neutron_or_nova_does_without_an_option_is_not_to_be_done(
    texts: list[str], fates: dict[str, Fate | None]
) -> None:
    found = _fates(_import(*texts))
    assert {name: found.get(name) for name in fates} == fates


def test_the_secret_is_nowhere_but_in_its_place() -> None:
    imported = _import(_SECRET)
    assert imported.secret == "topsecretvalue"
    assert "topsecret" not in imported.text + str(imported.report) + str(imported.settings)
    assert _import("state_path = /x\n", _NOVA.format("a$$b")).secret == "a$b"


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


@pytest.mark.parametrize(
    ("text", "field", "reason", "hint"),
    [
        ("nova_metadata_port = 0", "nova_metadata_port", '"0" is not', "from 1 to 65535"),
        ("nova_metadata_port = 70000", "nova_metadata_port", '"70000" is not', "from 1 to 65535"),
        ("nova_metadata_port = 80x", "nova_metadata_port", "is not acceptable", "an integer"),
        ("nova_metadata_protocol = HTTPS", "nova_metadata_protocol", "HTTPS is not", "http, https"),
        ("nova_metadata_insecure = maybe", "nova_metadata_insecure", "maybe is not", "true or"),
        ("nova_metadata_insecure =", "nova_metadata_insecure", '"" is not', "true or false"),
        ("nova_metadata_host = a b", "nova_metadata_host", "blanks", "a name or an address"),
        ("nova_metadata_host =", "nova_metadata_host", "neither a name", "a name or an address"),
        ("nova_metadata_host = a/b", "nova_metadata_host", "end after", "a name or an address"),
        ("nova_metadata_host = a\n  b", "nova_metadata_host", "is not", "a text on one line"),
        ("nova_metadata_host = 169.254.169.254", "nova_metadata_host", "come back here", "a name"),
        ("metadata_proxy_socket_mode = 0666", "metadata_proxy_socket_mode", '"0666"', "deduce"),
        ("metadata_proxy_socket = s", "metadata_proxy_socket", "not an absolute path", "absolute"),
        ("metadata_proxy_socket = $my/s", "metadata_proxy_socket", "$my", "write the value"),
        ("state_path = $state_path", "state_path", "refers to itself", "write the value"),
        ("state_path = lib", "state_path", "not an absolute path", "absolute"),
        ("auth_ca_cert = ca.pem", "auth_ca_cert", "not an absolute path", "absolute"),
        ("metadata_proxy_user = a b", "metadata_proxy_user", "proxy_user", "an account name"),
        ("metadata_workers = -1", "metadata_workers", '"-1" is not', "from 0 on"),
        ("metadata_backlog = 0", "metadata_backlog", '"0" is not', "from 1 on"),
        ("enable_metadata_proxy = 2", "enable_metadata_proxy", '"2" is not', "true or false"),
        ("metadata_port = http", "metadata_port", "http is not", "from 1 to 65535"),
        (
            "nova_metadata_protocol = https\nnova_metadata_host = 192.0.2.1",
            "nova_metadata_protocol",
            "server_name is missing",
            "--server-name",
        ),
    ],
)
def test_nonsense_is_refused_with_its_file_and_line(
    text: str, field: str, reason: str, hint: str
) -> None:
    (problem,) = _problems(f"{_SECRET}{text}\n")

    assert problem.field == f"[DEFAULT] {field}"
    assert reason in problem.reason
    assert hint in problem.hint
    assert (problem.file, problem.line) == ("a.ini", 3)


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ("metadata_rate_limiting", "ip_versions = 4,5"),
        ("metadata_rate_limiting", "rate_limit_enabled = perhaps"),
        ("metadata_haproxy", "timeout_server = 0"),
        ("METADATA", "nova_metadata_port = x"),
        ("METADATA", "provider_vlan_id = 4095"),
        ("cache", "expiration_time = soon"),
        ("agent", "report_interval = often"),
        ("AGENT", "check_child_processes_action = pray"),
        ("ovn", "ovsdb_log_level = loud"),
    ],
)
def test_nonsense_in_what_is_not_taken_over_is_refused_too(section: str, text: str) -> None:
    (problem,) = _problems(f"{_SECRET}[{section}]\n{text}\n")

    assert problem.hint.startswith("Neutron takes ")
    assert problem.line == 4


def test_all_problems_come_at_once_with_their_files() -> None:
    problems = _problems(
        f"{_SECRET}nova_metadata_port = x\n", "metadata_workers = y\nmetadata_proxy_socket_mode = z"
    )

    assert {(one.file, one.line) for one in problems} == {
        ("a.ini", 3),
        ("b.ini", 2),
        ("b.ini", 3),
    }


@pytest.mark.parametrize(
    ("texts", "place", "reason"),
    [
        (("state_path = /x\n",), (None, None), "in none of the files"),
        (("metadata_proxy_shared_secret =\n",), ("a.ini", 2), "is empty"),
        (("metadata_proxy_shared_secret = ''\n",), ("a.ini", 2), "is empty"),
        (("state_path = /x\n", _NOVA.format("")), ("b.ini", 2), "is empty"),
        (("metadata_proxy_shared_secret = ' a'\n",), ("a.ini", 2), "begins or ends with a blank"),
        (("metadata_proxy_shared_secret = a\n b\n",), ("a.ini", 2), "its value is not acceptable"),
        (("metadata_proxy_shared_secret = a$b\n",), ("a.ini", 2), "refers to $b"),
        (
            ("metadata_proxy_shared_secret = hush\n", _NOVA.format("tush")),
            ("a.ini", 2),
            "differs from the one in b.ini:2",
        ),
    ],
)
def test_a_secret_that_cannot_sign_is_refused_and_not_shown(
    texts: tuple[str, ...], place: tuple[str | None, int | None], reason: str
) -> None:
    problems = _problems(*texts)

    problem = problems[0]
    assert (problem.file, problem.line) == place
    assert reason in problem.reason
    assert not any(word in str(one) for one in problems for word in ("hush", "tush"))


def test_what_is_given_beside_the_files_is_checked_and_taken_over(tmp_path: Path) -> None:
    problems = _problems(_SECRET, agent_user="a b")
    assert [one.field for one in problems] == ["unix_listener.user", "unix_listener.group"]
    text = f"{_SECRET}nova_metadata_protocol = https\n"
    found = _settings(_import(text, server_name="nova.example.org").text, tmp_path)
    assert found[f"{_SET}.server_name"] == "nova.example.org"


def test_each_option_stands_once_and_leads_to_a_setting_there_is() -> None:
    names = [name for option in NEUTRON_OPTIONS for name in option.names]
    assert len(set(names)) == len(names)
    for option in NEUTRON_OPTIONS:
        assert option.why.endswith(".")
        place = re.split(r"\.", option.becomes.replace("[0]", ""))
        steps: list[str | int] = []
        for step in place if option.becomes else ():
            steps += [step, 0] if step == "endpoints" else [step]
        assert find_setting(steps) is not None
        for word in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)`", option.why):
            assert find_setting(word.split(".")) is not None, word


@pytest.mark.parametrize("option", NEUTRON_OPTIONS, ids=lambda one: f"{one.section}-{one.name}")
def test_each_default_is_one_that_neutron_takes(option: object) -> None:
    found = next(one for one in NEUTRON_OPTIONS if one is option)
    if found.name not in {"metadata_workers", "host"}:  # worked out by Neutron
        assert found.accepts(found.default)


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
