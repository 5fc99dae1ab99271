from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imdsproxy.config.describe import schema_at
from imdsproxy.config.load import load_settings
from imdsproxy.config.neutron_import import Given, Imported, plan_import, render_imported
from imdsproxy.config.neutron_options import NEUTRON_OPTIONS, Fate
from imdsproxy.config.schema import Settings
from imdsproxy.core.neutron_ini import parse_ini
from imdsproxy.errors import ConfigInvalid, Problem

_SECRET = "metadata_proxy_shared_secret = topsecretvalue\n"
_NOVA = "[neutron]\nmetadata_proxy_shared_secret = {}\n"
_GIVEN = Given(Path("/etc/imdsproxy/nova.secret"))


def _import(*texts: str, given: Given = _GIVEN, names: Sequence[str] | None = None) -> Imported:
    """Import files named a.ini, b.ini and so on; a text without a section is in [DEFAULT]."""
    files = []
    for name, text in zip(names or [f"{one}.ini" for one in "abcdef"], texts, strict=False):
        whole = text if text.startswith("[") else f"[DEFAULT]\n{text}"
        files.append(parse_ini(whole, name))
    return plan_import(files, given)


def _settings(imported: Imported, tmp_path: Path) -> Settings:
    config = tmp_path / "c.yaml"
    config.write_text(render_imported(imported))
    return load_settings(config, {}).settings


def _problems(*texts: str, given: Given = _GIVEN) -> list[Problem]:
    with pytest.raises(ConfigInvalid) as caught:
        _import(*texts, given=given)
    return list(caught.value.problems)


def test_the_secret_is_enough_since_the_rest_has_neutrons_defaults(tmp_path: Path) -> None:
    imported = _import(_SECRET)

    settings = _settings(imported, tmp_path)

    default = settings.nova.endpoint_sets["default"]
    assert [str(one.url) for one in default.endpoints] == ["http://127.0.0.1:8775"]
    assert default.verify
    assert settings.unix_listener.enabled
    assert settings.unix_listener.path == Path("/var/lib/neutron/metadata_proxy")
    assert settings.unix_listener.user == settings.unix_listener.group == "neutron"
    assert settings.nova.response_timeout_s == Settings().nova.response_timeout_s
    assert not settings.sources.neutron.enabled


def test_every_option_that_has_an_equivalent_arrives(tmp_path: Path) -> None:
    imported = _import(
        f"{_SECRET}nova_metadata_host = 2001:db8::1\nnova_metadata_port = 443\n"
        "nova_metadata_protocol = https\nnova_metadata_insecure = On\nauth_ca_cert = /ca\n"
        "nova_client_cert = /c\nnova_client_priv_key = /k\nstate_path = /state\n"
        "metadata_proxy_socket = $state_path/s\nmetadata_proxy_socket_mode = all\n"
        "metadata_proxy_user = 99\nmetadata_proxy_group = www-data\n"
        "[metadata_haproxy]\ntimeout_server = 100\n"
    )

    settings = _settings(imported, tmp_path)

    default = settings.nova.endpoint_sets["default"]
    assert [str(one.url) for one in default.endpoints] == ["https://[2001:db8::1]:443"]
    assert not default.verify
    assert default.ca_file == Path("/ca")
    assert default.client_cert_file == Path("/c")
    assert default.client_key_file == Path("/k")
    assert default.secret_file == Path("/etc/imdsproxy/nova.secret")
    assert settings.nova.response_timeout_s == 98
    listener = settings.unix_listener
    assert (listener.path, listener.mode) == (Path("/state/s"), "all")
    assert (listener.proxy_user, listener.proxy_group) == ("99", "www-data")
    taken = {one.option.names[0] for one in imported.reported if one.fate is Fate.TAKEN}
    assert taken == {
        option.names[0]
        for option in NEUTRON_OPTIONS
        if option.fate is Fate.TAKEN and option.section != "neutron"
    }


def test_the_secret_is_nowhere_but_in_its_place() -> None:
    imported = _import(_SECRET)

    assert imported.secret == "topsecretvalue"
    assert "topsecret" not in render_imported(imported)


def test_the_socket_moves_with_the_state_path(tmp_path: Path) -> None:
    settings = _settings(_import(f"{_SECRET}state_path = /srv"), tmp_path)

    assert settings.unix_listener.path == Path("/srv/metadata_proxy")


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
    imported = _import(*texts, names=[name] if name else None)

    assert ("" if imported.ovn is None else imported.ovn.name) == shown_by
    assert _settings(imported, tmp_path).unix_listener.take_over is bool(shown_by)


@pytest.mark.parametrize(("timeout", "seconds"), [("1", 1), ("3", 1), ("32", 30), ("9999", 600)])
def test_a_guest_is_answered_before_its_proxy_gives_up(
    tmp_path: Path, timeout: str, seconds: int
) -> None:
    imported = _import(f"{_SECRET}[metadata_haproxy]\ntimeout_server = {timeout}\n")

    assert _settings(imported, tmp_path).nova.response_timeout_s == seconds


def test_a_later_file_wins_and_what_it_wins_over_is_reported(tmp_path: Path) -> None:
    imported = _import(
        f"{_SECRET}nova_metadata_host = a\n", "nova_metadata_ip = b\nnova_metadata_ip = c\n"
    )

    endpoints = _settings(imported, tmp_path).nova.endpoint_sets["default"].endpoints
    assert [one.url.host for one in endpoints] == ["c"]
    lost = [(one.file, one.line, by.line) for one, by in imported.overridden]
    assert lost == [("a.ini", 3, 3), ("b.ini", 2, 3)]
    one = next(one for one in imported.reported if one.option.name == "nova_metadata_host")
    assert one.why.startswith("Of old, for `nova_metadata_host`.")


def test_the_same_value_twice_is_nothing_to_tell() -> None:
    imported = _import(f"{_SECRET}metadata_proxy_socket = /var/lib/neutron/metadata_proxy\n",
                       "metadata_proxy_socket = $state_path/metadata_proxy\n")  # fmt: skip

    assert imported.overridden == ()


def test_a_client_certificate_without_its_key_is_not_used_as_in_neutron(tmp_path: Path) -> None:
    imported = _import(f"{_SECRET}nova_client_cert = /c\nnova_client_priv_key =\n")

    assert _settings(imported, tmp_path).nova.endpoint_sets["default"].client_cert_file is None
    fates = {one.option.name: one.fate for one in imported.reported}
    assert fates["nova_client_cert"] is fates["nova_client_priv_key"] is Fate.NONE


def test_novas_own_options_are_not_taken_for_neutrons(tmp_path: Path) -> None:
    nova = "[DEFAULT]\nstate_path = /var/lib/nova\nhost = h\nmetadata_workers = x\n"
    imported = _import(_SECRET, nova + _NOVA.format("topsecretvalue"))

    assert _settings(imported, tmp_path).unix_listener.path.is_relative_to("/var/lib/neutron")
    assert imported.host is None
    assert "metadata_workers" not in {one.option.name for one in imported.reported}


@pytest.mark.parametrize(
    ("value", "fates"),
    [("true", (Fate.NONE, Fate.BY_HAND)), ("false", (Fate.BY_HAND, Fate.NONE))],
)
def test_what_nova_has_right_already_is_nothing_to_do(value: str, fates: tuple[Fate, Fate]) -> None:
    nova = f"[neutron]\nservice_metadata_proxy = {value}\n[api]\nlocal_metadata_per_cell = {value}"
    imported = _import(_SECRET, nova)

    one = {one.option.name: one.fate for one in imported.reported}
    assert (one["service_metadata_proxy"], one["local_metadata_per_cell"]) == fates


def test_novas_secret_stands_in_where_neutron_has_none() -> None:
    assert _import("state_path = /x\n", _NOVA.format("a$$b")).secret == "a$b"


def test_neutrons_host_is_offered_for_the_list_of_ports(tmp_path: Path) -> None:
    text = render_imported(_import(f"{_SECRET}host = compute-1\n"))
    config = tmp_path / "c.yaml"
    # Both signs away from the last line, and the first one from the others.
    config.write_text(
        re.sub(r"^#(?=sources|  )", "", text, flags=re.MULTILINE).replace("# list_h", "list_h")
    )

    source = load_settings(config, {}).settings.sources.neutron

    assert (source.enabled, source.cloud, source.list_host) == (True, "CLOUD", "compute-1")


def test_an_option_that_looks_like_another_is_doubtful() -> None:
    imported = _import(f"{_SECRET}nova_metadata_prot = 1\nmetadata-workers = 2\nl3_x = 3\n")

    assert [(one.name, near) for one, near in imported.doubtful] == [
        ("nova_metadata_prot", "nova_metadata_port"),
        ("metadata-workers", "metadata_workers"),
    ]
    assert imported.others == 3


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


def test_an_account_of_the_agents_that_is_none_is_refused() -> None:
    problems = _problems(_SECRET, given=Given(Path("/x"), agent_user="a b"))

    assert [one.field for one in problems] == ["unix_listener.user", "unix_listener.group"]


def test_a_name_for_the_certificate_can_be_given(tmp_path: Path) -> None:
    text = f"{_SECRET}nova_metadata_protocol = https\n"
    imported = _import(text, given=Given(Path("/x"), server_name="nova.example.org"))

    default = _settings(imported, tmp_path).nova.endpoint_sets["default"]
    assert default.server_name == "nova.example.org"


def test_each_option_stands_once_and_leads_to_a_setting_there_is() -> None:
    names = [name for option in NEUTRON_OPTIONS for name in option.names]
    assert len(set(names)) == len(names)
    for option in NEUTRON_OPTIONS:
        assert option.why.endswith(".")
        place = re.split(r"\.", option.becomes.replace("[0]", ""))
        steps: list[str | int] = []
        for step in place if option.becomes else ():
            steps += [step, 0] if step == "endpoints" else [step]
        assert schema_at(steps) is not None
        for word in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)`", option.why):
            assert schema_at(word.split(".")) is not None, word


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
        imported = plan_import([parse_ini(f"[DEFAULT]\n{_SECRET}{text}", "f")], _GIVEN)
    except ConfigInvalid as error:
        assert error.problems  # noqa: PT017 - either way is right
        return
    Settings.model_validate(imported.nested)
