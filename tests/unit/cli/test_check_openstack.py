from __future__ import annotations

import json
import os
import socket
import ssl
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from imdsproxy.cli.checks import openstack as preflight
from imdsproxy.cli.checks.every import why_unreachable
from imdsproxy.cli.checks.finding import Finding
from imdsproxy.cli.main import main
from imdsproxy.config.schema import Settings
from imdsproxy.host.socket_file import SocketHolder
from imdsproxy.nova.settings import NovaUrl
from support.certificates import Authority, make_authority, server_context

_SECRET = b"0123456789abcdef"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_bytes(_SECRET + b"\n")
    path.chmod(0o600)
    return path


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return make_authority(tmp_path_factory.mktemp("ca"), "ca")


def _settings(secret: Path, **words: object) -> Settings:
    default = {"endpoints": [{"url": "http://127.0.0.1:1"}], "secret_file": str(secret), **words}
    return Settings.model_validate({"nova": {"endpoint_sets": {"default": default}}})


def _told(findings: list[Finding]) -> list[tuple[bool, bool, str]]:
    return [(one.ok, one.warning, one.text) for one in findings]


def test_without_nova_nothing_is_asked() -> None:
    settings = Settings()

    assert preflight.check_secrets(settings) == []
    assert preflight.check_certificates(settings) == []
    assert preflight.check_clouds(settings) == []
    assert preflight.check_endpoints(settings, lambda *_: "never asked") == []
    assert preflight.check_unix_listener(settings, lambda _: SocketHolder(), Path("/x")) == []


def test_a_secret_for_us_only_is_fine(secret: Path) -> None:
    assert _told(preflight.check_secrets(_settings(secret))) == [
        (True, False, "secrets can be read")
    ]


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [
        (b" \n", 0o600, "is empty"),
        (_SECRET, 0o604, "every user of this host can use it"),
        (None, 0, "No such file"),
    ],
)
def test_a_secret_that_run_would_refuse_is_wrong(
    secret: Path, content: bytes | None, mode: int, words: str
) -> None:
    if content is None:
        secret.unlink()
    else:
        secret.write_bytes(content)
        secret.chmod(mode)

    (finding,) = preflight.check_secrets(_settings(secret))

    assert finding.exit_status == 78
    assert finding.text.startswith("nova.endpoint_sets.default.secret_file: ")
    assert words in finding.text
    assert finding.hint


def test_a_short_secret_and_one_that_is_next_and_current_are_warnings(
    secret: Path, tmp_path: Path
) -> None:
    secret.write_bytes(b" short\n")
    following = tmp_path / "next"
    following.write_bytes(b"short")
    following.chmod(0o600)

    findings = preflight.check_secrets(_settings(secret, next_secret_file=str(following)))

    assert [(one.ok, one.warning) for one in findings] == [(True, True)] * 3
    assert "only 5 bytes" in findings[0].text
    assert "the same as the current one" in findings[2].text


def test_certificates_and_their_key_are_fine(secret: Path, authority: Authority) -> None:
    client = authority.issue("client")
    for cert, key in ((client.certificate, str(client.key)), (client.bundle, None)):
        settings = _settings(
            secret,
            ca_file=str(authority.ca_file),
            client_cert_file=str(cert),
            client_key_file=key,
        )
        client.key.chmod(0o600)
        assert _told(preflight.check_certificates(settings)) == [
            (True, False, "certificates can be used")
        ]


def test_files_that_are_no_certificates_are_wrong_each_by_its_setting(
    secret: Path, tmp_path: Path, authority: Authority
) -> None:
    client, other = authority.issue("one"), authority.issue("two")
    client.key.chmod(0o600)
    other.key.chmod(0o600)
    text = tmp_path / "text"
    text.write_text("no PEM\n")
    cases = [
        ({"ca_file": str(text)}, "ca_file"),
        ({"ca_file": str(tmp_path / "none")}, "ca_file"),
        ({"client_cert_file": str(text)}, "client_cert_file"),
        ({"client_cert_file": str(client.certificate)}, "client_cert_file"),
        (
            {"client_cert_file": str(client.certificate), "client_key_file": str(other.key)},
            "client_cert_file",
        ),
        (
            {"client_cert_file": str(client.certificate), "client_key_file": str(tmp_path / "no")},
            "client_key_file",
        ),
    ]
    for words, setting in cases:
        (finding,) = preflight.check_certificates(_settings(secret, **words))
        assert finding.exit_status == 78, words
        assert finding.text.startswith(f"nova.endpoint_sets.default.{setting}: "), words


def test_a_key_that_others_can_read_is_wrong(secret: Path, authority: Authority) -> None:
    client = authority.issue("open")
    client.key.chmod(0o644)
    settings = _settings(
        secret, client_cert_file=str(client.certificate), client_key_file=str(client.key)
    )

    (finding,) = preflight.check_certificates(settings)

    assert finding.exit_status == 78
    assert "client_key_file" in finding.text


def test_an_endpoint_that_cannot_be_reached_is_a_warning(secret: Path) -> None:
    settings = _settings(
        secret, endpoints=[{"url": "http://a"}, {"url": "http://b:1"}, {"url": "http://[::1]"}]
    )
    asked = []

    def reach(url: NovaUrl, context: ssl.SSLContext | None, name: str) -> str | None:
        asked.append((str(url), context, name))
        return "no way" if url.host == "b" else None

    (finding,) = preflight.check_endpoints(settings, reach)

    assert finding.ok
    assert finding.warning
    assert finding.text == "nova.endpoint_sets.default.endpoints[1]: http://b:1: no way"
    assert set(asked) == {
        ("http://a:8775", None, "a"),
        ("http://b:1", None, "b"),
        ("http://[::1]:8775", None, "::1"),
    }
    assert _told(preflight.check_endpoints(settings, lambda *_: None)) == [
        (True, False, "3 endpoints can be reached")
    ]


@contextmanager
def _server(context: ssl.SSLContext | None = None) -> Iterator[int]:
    """Something that takes one connection after another, and ends TLS where there is a context."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    peer, _ = listener.accept()
                except OSError:
                    return
                with peer:
                    if context is not None:
                        try:
                            context.wrap_socket(peer, server_side=True).close()
                        except OSError:
                            continue

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def test_a_way_is_tried_as_far_as_the_certificate(secret: Path, authority: Authority) -> None:
    own = authority.issue("nova", names=["DNS:nova.example.org"])
    with _server(server_context(own)) as port:
        url = NovaUrl("https", "127.0.0.1", port)
        one = {"endpoints": [{"url": str(url)}], "server_name": "nova.example.org"}

        def reason(**words: object) -> str | None:
            settings = _settings(secret, **{**one, **words})
            found = settings.nova.endpoint_sets["default"]
            context = preflight.tls_context(found)
            return why_unreachable(url, context, found.server_name or url.host, 5)

        assert reason(ca_file=str(authority.ca_file)) is None
        assert reason(verify=False) is None
        assert "issuer" in str(reason())
        wrong = reason(ca_file=str(authority.ca_file), server_name="other.example.org")
        assert "mismatch" in str(wrong)


def test_a_way_that_leads_nowhere_has_a_reason() -> None:
    with _server() as port:
        assert why_unreachable(NovaUrl("http", "127.0.0.1", port), None, "", 5) is None
    assert "refused" in str(why_unreachable(NovaUrl("http", "127.0.0.1", port), None, "", 5))
    assert why_unreachable(NovaUrl("http", "nova.invalid", 1), None, "", 5)


def _clouds(path: Path, **source: object) -> Settings:
    neutron = {"enabled": True, "cloud": "here", "clouds_file": str(path), **source}
    sets = {"default": {"endpoints": [{"url": "http://nova"}], "secret_file": "/x"}}
    return Settings.model_validate(
        {"sources": {"neutron": neutron}, "nova": {"endpoint_sets": sets}}
    )


@pytest.mark.parametrize(
    ("content", "mode", "told"),
    [
        (b"clouds: {here: {}}\n", 0o600, (True, False, "cloud here of")),
        (b"clouds: {here: {auth_type: none}}\n", 0o644, (True, False, "cloud here of")),
        (
            b"clouds: {here: {auth_type: none}, there: {auth: {password: x}}}\n",
            0o644,
            (True, True, "which holds a secret (password)"),
        ),
        (
            b"clouds: {here: {auth: {application_credential_secret: x}}}\n",
            0o644,
            (True, True, "a secret (application_credential_secret)"),
        ),
        (b"clouds: {there: {}}\n", 0o600, (False, False, "has no cloud here")),
        (b"- 1\n", 0o600, (False, False, "has no cloud here")),
        (b"a: [\n", 0o600, (False, False, "is not YAML")),
        (b"\xff", 0o600, (False, False, "not UTF-8")),
        (None, 0, (False, False, "No such file")),
    ],
)
def test_the_cloud_has_to_be_in_its_file(
    tmp_path: Path, content: bytes | None, mode: int, told: tuple[bool, bool, str]
) -> None:
    path = tmp_path / "clouds.yaml"
    if content is not None:
        path.write_bytes(content)
        path.chmod(mode)

    (finding,) = preflight.check_clouds(_clouds(path))

    assert (finding.ok, finding.warning) == told[:2]
    assert told[2] in finding.text


def test_a_neutron_without_keystone_needs_no_cloud() -> None:
    settings = _clouds(Path("/x"), cloud=None, clouds_file=None, endpoint="http://127.0.0.1:9696")

    assert preflight.check_clouds(settings) == []


def test_without_openstacksdk_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "keystoneauth1", None)
    (finding,) = preflight.check_clouds(_clouds(Path("/nonexistent")))
    assert "openstacksdk cannot be imported" in finding.text
    assert "apt install python3-openstacksdk" in finding.hint
    assert "pip install 'imdsproxy[neutron]'" in finding.hint


_LISTENING = Settings.model_validate({"unix_listener": {"enabled": True, "path": "/var/s"}})


@pytest.mark.parametrize(
    ("listener", "status", "words", "hint"),
    [
        (None, 0, "no process listens at /var/s", ""),
        (
            SocketHolder(7, ("haproxy", "-Ws", "-f", "/run/haproxy.cfg")),
            0,
            "imdsproxy's HAProxy listens at /var/s (pid 7)",
            "",
        ),
        (
            SocketHolder(
                8, ("/usr/bin/python3", "/usr/bin/neutron-metadata-agent", "--config-file")
            ),
            0,
            "neutron-metadata-agent (pid 8) listens at /var/s",
            "guests are its own until you stop neutron-metadata-agent",
        ),
        (
            SocketHolder(8, ("python3", "-m", "neutron.agent.metadata_agent")),
            0,
            "neutron-metadata-agent (pid 8) listens at /var/s",
            "guests are its own until you stop neutron-metadata-agent",
        ),
        (SocketHolder(9, ("socat", "x")), 71, "socat x (pid 9) listens", "stop it, or change"),
        (SocketHolder(), 71, "a process that cannot be seen listens", "stop it, or change"),
    ],
)
def test_who_is_in_the_sockets_place_is_told(
    listener: SocketHolder | None, status: int, words: str, hint: str
) -> None:
    (finding,) = preflight.check_unix_listener(
        _LISTENING, lambda _: listener, Path("/run/haproxy.cfg")
    )

    assert finding.exit_status == status
    assert finding.warning is ("agent" in words)
    assert words in finding.text
    assert finding.hint.startswith(hint)


@pytest.mark.parametrize(
    ("listener", "words", "hint"),
    [
        (
            SocketHolder(8, ("/usr/bin/python3", "/usr/bin/neutron-ovn-agent")),
            "neutron-ovn-agent (pid 8) listens at /var/s",
            "each time that neutron-ovn-agent starts (unix_listener.take_over)",
        ),
        (SocketHolder(9, ("socat", "x")), "socat x (pid 9) listens", "each time that it starts"),
        (SocketHolder(), "a process that cannot be seen listens", "imdsproxy takes the path over"),
    ],
)
def test_who_is_to_be_taken_over_is_told_and_no_reason_not_to_start(
    listener: SocketHolder, words: str, hint: str
) -> None:
    unix = _LISTENING.unix_listener.model_copy(update={"take_over": True})
    settings = _LISTENING.model_copy(update={"unix_listener": unix})

    (finding,) = preflight.check_unix_listener(settings, lambda _: listener, Path("/run/h.cfg"))

    assert (finding.warning, finding.exit_status) == (True, 0)
    assert words in finding.text
    assert hint in finding.hint


def test_check_asks_all_of_it_and_a_warning_is_no_failure_of_its_own(
    tmp_path: Path, secret: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.yaml"
    place = tmp_path / "metadata_proxy"
    config.write_text(
        f"paths: {{runtime_dir: {tmp_path}/run, state_dir: {tmp_path}/state}}\n"
        "metrics: {listen: null, haproxy_listen: null}\n"
        "nova: {endpoint_sets: {default: {endpoints: [{url: 'http://127.0.0.1:1'}], "
        f"secret_file: {secret}}}}}}}\n"
        f"unix_listener: {{enabled: true, path: {place}, proxy_user: '4294967', "
        "proxy_group: imdst-nobody}\n"
    )
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place))
        listener.listen()

        status = main(["check", "--json", "--config", str(config)])

    findings = json.loads(capsys.readouterr().out)["findings"]
    told = {one["text"]: (one["ok"], one["warning"]) for one in findings}
    assert status != 0
    unreached = "nova.endpoint_sets.default.endpoints[0]: http://127.0.0.1:1: Connection refused"
    assert told[unreached] == (True, True)
    assert told["secrets can be read"] == (True, False)
    missing = "unix_listener.proxy_group: this host has no group imdst-nobody"
    assert told[missing] == (False, False)
    assert not any("4294967" in text for text in told)
    mine = next(text for text in told if text.startswith("unix_listener.path: "))
    assert f"(pid {os.getpid()}) listens at {place}" in mine
    assert told[mine] == (False, False)
