from __future__ import annotations

import socketserver
import ssl
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from imdsproxy.cli.checks import Subject, openstack
from imdsproxy.host.socket_file import SocketHolder
from support.certificates import Authority, make_authority, server_context
from support.check_subject import subject, summarise

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


def _on(secret: Path, **members: object) -> Subject:
    default = {"endpoints": [{"url": "http://127.0.0.1:1"}], "secret_file": str(secret), **members}
    return subject({"nova": {"endpoint_sets": {"default": default}}})


@pytest.mark.parametrize(
    ("content", "following", "mode", "found"),
    [
        (_SECRET, None, 0o600, [(0, False, "secrets can be read")]),
        (b" \n", None, 0o600, [(78, False, "is empty")]),
        (_SECRET, None, 0o604, [(78, False, "every user of this host can use it")]),
        (None, None, 0, [(78, False, "No such file")]),
        (b" short\n", b"short", 0o600,
         [(0, True, "only 5 bytes"), (0, True, "only 5 bytes"), (0, True, "the same as the current one")]),
    ],
)  # fmt: skip
def test_a_secret_that_run_would_refuse_is_wrong_and_one_that_is_easily_guessed_a_warning(
    tmp_path: Path,
    content: bytes | None,
    following: bytes | None,
    mode: int,
    found: list[tuple[int, bool, str]],
) -> None:
    for name, data in (("secret", content), ("next", following)):
        if data is not None:
            (tmp_path / name).write_bytes(data)
            (tmp_path / name).chmod(mode)
    more = {} if following is None else {"next_secret_file": str(tmp_path / "next")}
    findings = openstack.check_secrets(_on(tmp_path / "secret", **more))
    assert [(one.exit_status, one.warning) for one in findings] == [one[:2] for one in found]
    for finding, (status, warning, text) in zip(findings, found, strict=True):
        assert text in finding.text
        assert finding.text.startswith("nova.endpoint_sets.default") is bool(status or warning)
        assert bool(finding.hint) is bool(status or warning)


@pytest.fixture(scope="module")
def directory(authority: Authority) -> Path:
    """Of the files in the table below."""
    client, other, shown = (authority.issue(name) for name in ("client", "other", "shown"))
    for one, mode in ((client, 0o600), (other, 0o600), (shown, 0o644)):
        one.key.chmod(mode)
    authority.ca_file.with_name("text").write_text("no PEM\n")
    return authority.ca_file.parent


@pytest.mark.parametrize(
    ("members", "setting"),
    [
        (
            {
                "ca_file": "ca.crt",
                "client_cert_file": "client.crt",
                "client_key_file": "client.key",
            },
            "",
        ),
        ({"ca_file": "ca.crt", "client_cert_file": "client.pem"}, ""),
        ({"ca_file": "text"}, "ca_file"),
        ({"ca_file": "none"}, "ca_file"),
        ({"client_cert_file": "text"}, "client_cert_file"),
        ({"client_cert_file": "client.crt"}, "client_cert_file"),
        ({"client_cert_file": "client.crt", "client_key_file": "other.key"}, "client_cert_file"),
        ({"client_cert_file": "client.crt", "client_key_file": "none"}, "client_key_file"),
        ({"client_cert_file": "shown.crt", "client_key_file": "shown.key"}, "client_key_file"),
    ],
)
def test_a_file_that_is_no_certificate_or_key_is_wrong_by_its_setting(
    secret: Path, directory: Path, members: Mapping[str, str], setting: str
) -> None:
    on = _on(secret, **{name: str(directory / one) for name, one in members.items()})
    (finding,) = openstack.check_certificates(on)
    assert finding.exit_status == (78 if setting else 0)
    expected = f"nova.endpoint_sets.default.{setting}: " if setting else "certificates can be used"
    assert finding.text.startswith(expected)


@contextmanager
def _server(context: ssl.SSLContext | None = None) -> Iterator[int]:
    """Something that takes one connection after another, and ends TLS where there is a context."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            if context is not None:
                with suppress(OSError):
                    context.wrap_socket(self.request, server_side=True).close()

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


_ENDPOINT = "nova.endpoint_sets.default.endpoints"


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"ca_file": "ca"}, ""),
        ({"verify": False}, ""),
        ({}, "issuer"),
        ({"ca_file": "ca", "server_name": "other.example.org"}, "mismatch"),
    ],
)
def test_an_endpoint_is_tried_as_far_as_its_certificate(
    secret: Path, authority: Authority, members: Mapping[str, object], reason: str
) -> None:
    given = {one: str(authority.ca_file) if one == "ca_file" else to for one, to in members.items()}
    own = authority.issue("nova", names=["DNS:nova.example.org"])
    with _server(server_context(own)) as port:
        endpoints = [{"url": f"https://127.0.0.1:{port}"}]
        named = {"endpoints": endpoints, "server_name": "nova.example.org", **given}
        (finding,) = openstack.check_endpoints(_on(secret, **named))
    assert (finding.ok, finding.warning) == (True, bool(reason))
    assert reason in finding.text


def test_each_endpoint_that_cannot_be_reached_is_a_warning(secret: Path) -> None:
    with _server() as port:
        here = {"url": f"http://127.0.0.1:{port}"}
        elsewhere = {"url": "http://nova.invalid"}
        refusing = {"url": "http://127.0.0.1:1"}
        fine = openstack.check_endpoints(_on(secret, endpoints=[here]))
        found = openstack.check_endpoints(_on(secret, endpoints=[here, refusing, elsewhere]))
    assert summarise(fine) == [(0, False, "1 endpoint can be reached")]
    assert [(one.ok, one.warning) for one in found] == [(True, True)] * 2
    assert found[0].text == f"{_ENDPOINT}[1]: http://127.0.0.1:1: Connection refused"
    assert found[1].text.startswith(f"{_ENDPOINT}[2]: http://nova.invalid:8775: ")


def _clouds(path: Path, **source: object) -> Subject:
    neutron = {"enabled": True, "cloud": "here", "clouds_file": str(path), **source}
    sets = {"default": {"endpoints": [{"url": "http://nova"}], "secret_file": "/x"}}
    return subject({"sources": {"neutron": neutron}, "nova": {"endpoint_sets": sets}})


@pytest.mark.parametrize(
    ("content", "mode", "reported"),
    [
        (b"clouds: {here: {}}\n", 0o600, (True, False, "cloud here of")),
        (b"clouds: {here: {auth_type: none}}\n", 0o644, (True, False, "cloud here of")),
        (b"clouds: {here: {auth_type: none}, there: {auth: {password: x}}}\n", 0o644,
         (True, True, "which holds a secret (password)")),
        (b"clouds: {here: {auth: {application_credential_secret: x}}}\n", 0o644,
         (True, True, "a secret (application_credential_secret)")),
        (b"clouds: {there: {}}\n", 0o600, (False, False, "has no cloud here")),
        (b"- 1\n", 0o600, (False, False, "has no cloud here")),
        (b"a: [\n", 0o600, (False, False, "is not YAML")),
        (b"\xff", 0o600, (False, False, "not UTF-8")),
        (None, 0, (False, False, "No such file")),
    ],
)  # fmt: skip
def test_the_cloud_has_to_be_in_its_file(
    tmp_path: Path, content: bytes | None, mode: int, reported: tuple[bool, bool, str]
) -> None:
    path = tmp_path / "clouds.yaml"
    if content is not None:
        path.write_bytes(content)
        path.chmod(mode)

    (finding,) = openstack.check_clouds(_clouds(path))

    assert (finding.ok, finding.warning) == reported[:2]
    assert reported[2] in finding.text
    alone = {"cloud": None, "clouds_file": None, "endpoint": "http://127.0.0.1:9696"}
    assert openstack.check_clouds(_clouds(path, **alone)) == [], "without Keystone it needs none"


def test_without_openstacksdk_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "keystoneauth1", None)
    (finding,) = openstack.check_clouds(_clouds(Path("/nonexistent")))
    assert "openstacksdk cannot be imported" in finding.text
    assert "apt install python3-openstacksdk" in finding.hint
    assert "pip install 'imdsproxy[neutron]'" in finding.hint


_AGENT = SocketHolder(8, ("/usr/bin/python3", "/usr/bin/neutron-metadata-agent", "--config-file"))
_MODULE = SocketHolder(8, ("python3", "-m", "neutron.agent.metadata_agent"))
_OVN = SocketHolder(8, ("/usr/bin/python3", "/usr/bin/neutron-ovn-agent"))
_OURS = SocketHolder(7, ("haproxy", "-Ws", "-f", "/run/imdst/haproxy.cfg"))
_SOCAT = SocketHolder(9, ("socat", "x"))
_UNTIL = "guests are its own until you stop neutron-metadata-agent"


@pytest.mark.parametrize(
    ("holder", "take_over", "status", "text", "hint"),
    [
        (None, False, 0, "no process listens at /var/s", ""),
        (_OURS, False, 0, "imdsproxy's HAProxy listens at /var/s (pid 7)", ""),
        (_AGENT, False, 0, "neutron-metadata-agent (pid 8) listens at /var/s", _UNTIL),
        (_MODULE, False, 0, "neutron-metadata-agent (pid 8) listens at /var/s", _UNTIL),
        (_SOCAT, False, 71, "socat x (pid 9) listens", "stop it, or change"),
        (SocketHolder(), False, 71, "a process that cannot be seen listens", "stop it, or change"),
        (_OVN, True, 0, "neutron-ovn-agent (pid 8) listens at /var/s",
         "each time that neutron-ovn-agent starts (unix_listener.take_over)"),
        (_SOCAT, True, 0, "socat x (pid 9) listens", "each time that it starts"),
        (SocketHolder(), True, 0, "a process that cannot be seen listens", "imdsproxy takes the path over"),
    ],
)  # fmt: skip
def test_a_process_at_the_sockets_path_is_wrong_unless_it_is_to_be_replaced(
    holder: SocketHolder | None, *, take_over: bool, status: int, text: str, hint: str
) -> None:
    listener = {"enabled": True, "path": "/var/s", "take_over": take_over}
    on = subject({"unix_listener": listener, "paths": {"runtime_dir": "/run/imdst"}})

    (finding,) = openstack.check_unix_listener(on, lambda _: holder)

    assert finding.exit_status == status
    assert finding.warning is (status == 0 and bool(hint))
    assert text in finding.text
    assert hint in finding.hint
