from __future__ import annotations

from pathlib import Path

import pytest

from imdsproxy.config.load import load_settings
from imdsproxy.config.schema import Settings
from imdsproxy.errors import ConfigInvalid, Problem

_SECRETS = "secret_file: /etc/current, next_secret_file: /etc/next"
_DEFAULT = "default: {endpoints: [{url: http://nova}], secret_file: /x}"


def _load(tmp_path: Path, text: str) -> Settings:
    config = tmp_path / "c.yaml"
    config.write_text(text)
    return load_settings(config, {}).settings


def _problem(tmp_path: Path, text: str) -> Problem:
    with pytest.raises(ConfigInvalid) as caught:
        _load(tmp_path, text)
    (problem,) = caught.value.problems
    assert problem.line == 1
    return problem


def _sets(*sets: str) -> str:
    return f"nova: {{endpoint_sets: {{{', '.join(sets)}}}}}\n"


def test_without_any_word_of_it_there_is_no_openstack() -> None:
    settings = Settings()

    assert settings.nova.endpoint_sets == {}
    assert not settings.unix_listener.enabled
    assert not settings.sources.neutron.enabled


def test_an_endpoint_set_has_all_that_it_needs(tmp_path: Path) -> None:
    settings = _load(
        tmp_path,
        _sets(
            "default: {endpoints: [{url: http://nova}, {url: 'http://[::1]', secret: next}], "
            f"{_SECRETS}, ca_file: /ca, client_cert_file: /c, client_key_file: /k, host: 'n:1'}}",
            "cell1: {endpoints: [{url: http://nova}], secret_file: /x, networks: [n], "
            "projects: [p]}",
        ),
    )

    assert set(settings.nova.endpoint_sets) == {"default", "cell1"}


@pytest.mark.parametrize(
    ("text", "field", "reason", "hint"),
    [
        (
            _sets("cell1: {endpoints: [{url: http://nova}], secret_file: /x}"),
            "nova.endpoint_sets",
            "no set `default`",
            "name one of them default",
        ),
        (
            _sets("default: {endpoints: [{url: http://a}], secret_file: /x, client_key_file: /k}"),
            "nova.endpoint_sets.default.client_key_file",
            "without client_cert_file",
            "both or neither",
        ),
        (
            _sets("default: {endpoints: [{url: http://a, secret: next}], secret_file: /x}"),
            "nova.endpoint_sets.default.next_secret_file",
            "an endpoint has the next secret",
            "name the file",
        ),
        (
            _sets("default: {endpoints: [{url: http://a}], secret_file: /x, next_secret_file: /x}"),
            "nova.endpoint_sets.default.next_secret_file",
            "same file",
            "a file of its own",
        ),
        (
            _sets(
                "default: {endpoints: [{url: http://a}, {url: 'http://A:8775'}], secret_file: /x}"
            ),
            "nova.endpoint_sets.default.endpoints",
            "stands twice",
            "once",
        ),
        (
            _sets(
                _DEFAULT,
                "a: {endpoints: [{url: http://nova}], secret_file: /x, networks: [n1, n2]}",
                "b: {endpoints: [{url: http://nova}], secret_file: /x, networks: [n2]}",
            ),
            "nova.endpoint_sets.b.networks",
            "network n2 is in a too",
            "keep it in one",
        ),
        (
            _sets(
                _DEFAULT,
                "a: {endpoints: [{url: http://nova}], secret_file: /x, projects: [p]}",
                "b: {endpoints: [{url: http://nova}], secret_file: /x, projects: [p]}",
            ),
            "nova.endpoint_sets.b.projects",
            "project p is in a too",
            "keep it in one",
        ),
        (
            _sets("default: {endpoints: [{url: http://a}, {url: https://a}], secret_file: /x}"),
            "nova.endpoint_sets.default.endpoints",
            "http and https are mixed",
            "one of them",
        ),
        (
            _sets("default: {endpoints: [{url: 'https://[2001:db8::1]'}], secret_file: /x}"),
            "nova.endpoint_sets.default.server_name",
            "2001:db8::1 is none",
            "the name in the endpoints' certificates",
        ),
        (
            _sets(
                "default: {endpoints: [{url: 'https://nova'}], secret_file: /x, server_name: 'a b'}"
            ),
            "nova.endpoint_sets.default.server_name",
            '"a b" is not acceptable',
            "takes a host's name",
        ),
        (
            "nova: {connect_timeout_s: 0}",
            "nova.connect_timeout_s",
            "0 is not acceptable",
            "takes a number from 0.1 to 30",
        ),
        (
            "nova: {health_check: icmp}",
            "nova.health_check",
            "icmp is not acceptable",
            "takes one of tcp, http, off",
        ),
        (
            "sources: {neutron: {enabled: true, cloud: c}}",
            "sources.neutron.enabled",
            "`nova.endpoint_sets` is empty",
            "name Nova's metadata API",
        ),
        (
            "sources: {neutron: {enabled: true}}",
            "sources.neutron.enabled",
            "neither `cloud` nor `endpoint`",
            "give one of them",
        ),
        (
            "sources: {neutron: {cloud: c, endpoint: 'http://127.0.0.1:9696'}}",
            "sources.neutron.endpoint",
            "`cloud` says already",
            "keep one",
        ),
        (
            "sources: {neutron: {clouds_file: /x}}",
            "sources.neutron.clouds_file",
            "does not say which",
            "cloud: NAME",
        ),
        (
            "sources: {neutron: {endpoint: 'localhost:9696'}}",
            "sources.neutron.endpoint",
            '"localhost:9696" is not acceptable',
            "takes a URL that begins with http://",
        ),
        (
            "sources: {neutron: {endpoint: 'http://x/?a=b'}}",
            "sources.neutron.endpoint",
            "is not acceptable",
            "without ? and #",
        ),
        (
            "sources: {neutron: {list_host: 'a b'}}",
            "sources.neutron.list_host",
            '"a b" is not acceptable',
            "takes a name of 1 to 255 ASCII letters",
        ),
        (
            "sources: {neutron: {cloud: ''}}",
            "sources.neutron.cloud",
            '"" is not acceptable',
            "takes a text, not empty, or null",
        ),
        (
            "unix_listener: {path: metadata_proxy}",
            "unix_listener.path",
            "not an absolute path",
            "takes an absolute path",
        ),
        (
            "unix_listener: {path: '/var/lib/neu tron/metadata_proxy'}",
            "unix_listener.path",
            "has characters other than",
            "takes an absolute path",
        ),
        (
            f"unix_listener: {{path: /var/{'a' * 93}}}",
            "unix_listener.path",
            "has 98 characters, HAProxy takes 97",
            "takes an absolute path",
        ),
        (
            "unix_listener: {mode: '0666'}",
            "unix_listener.mode",
            '"0666" is not acceptable',
            "takes one of deduce, user, group, all",
        ),
        (
            "unix_listener: {directory_mode: 755}",
            "unix_listener.directory_mode",
            "755 is not acceptable",
            "takes three octal digits in quotes",
        ),
        (
            "unix_listener: {proxy_user: 1000}",
            "unix_listener.proxy_user",
            "1000 is not acceptable",
            "takes an account name, or its number in quotes, or null",
        ),
        (
            "unix_listener: {user: '1000'}",
            "unix_listener.user",
            '"1000" is not acceptable',
            "takes an account name, or null",
        ),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_with_field_and_hint(
    tmp_path: Path, text: str, field: str, reason: str, hint: str
) -> None:
    problem = _problem(tmp_path, text)

    assert problem.field == field
    assert reason in problem.reason
    assert hint in problem.hint


@pytest.mark.parametrize("words", ["server_name: nova", "verify: false"])
def test_an_https_endpoint_may_be_an_address_when_its_name_is_told_or_not_asked(
    tmp_path: Path, words: str
) -> None:
    settings = _load(
        tmp_path,
        _sets(f"default: {{endpoints: [{{url: 'https://[::1]'}}], secret_file: /x, {words}}}"),
    )

    assert settings.nova.endpoint_sets["default"].endpoints[0].url.address


def test_the_same_network_twice_in_one_set_is_no_contradiction(tmp_path: Path) -> None:
    settings = _load(
        tmp_path,
        _sets("default: {endpoints: [{url: http://nova}], secret_file: /x, networks: [n, n]}"),
    )

    assert settings.nova.endpoint_sets["default"].networks == ("n", "n")


def test_a_neutron_that_needs_no_token_is_enough(tmp_path: Path) -> None:
    settings = _load(
        tmp_path,
        "sources: {sqlite: {enabled: false}, "
        f"neutron: {{enabled: true, endpoint: 'http://127.0.0.1:9696'}}}}\n{_sets(_DEFAULT)}",
    )

    assert settings.sources.neutron.endpoint == "http://127.0.0.1:9696"
