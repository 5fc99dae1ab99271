"""Genuine Keystone behind Apache, whose module auth_openidc verifies tokens of one issuer.

Keystone verifies no token of another issuer itself: Apache does, and passes its claims in headers. A mapping makes the
guest a member of the group `vm-PROJECT`, and an operator gives that group a role in the project.
"""

import contextlib
import http.client
import json
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from support.certificates import make_authority
from support.demonstration import REPOSITORY
from support.guest import inside
from support.identity.signing import Issuer
from support.lab import run, within
from support.openstack.install import made_once, stamp_of
from support.openstack.neutron_rest import Answer, ask
from support.openstack.servers import Server, ends_with_us
from support.patience import patience
from support.pinned_venv import pinned_venv
from support.reaper import reap_at_the_end

AUDIENCE: Final = "keystone"
_PORT: Final = 5000
_BEHIND: Final = "127.0.0.1:5001"
_PROVIDER: Final = "imds"
_PASSWORD: Final = "admin"
_MANAGE_S: Final = 120
_CLIENT_S: Final = 60
_MODULES: Final = (
    "mpm_event",
    "authn_core",
    "authz_core",
    "authz_user",
    "socache_shmcb",
    "ssl",
    "proxy",
    "proxy_http",
    "auth_openidc",
)

_KEYSTONE_CONF: Final = """
[DEFAULT]
use_stderr = true
public_endpoint = {url}
[database]
connection = sqlite:///{directory}/keystone.sqlite
[fernet_tokens]
key_repository = {directory}/tokens
[credential]
key_repository = {directory}/credentials
[auth]
methods = password,token,openid
[openid]
remote_id_attribute = HTTP_OIDC_ISS
[cache]
enabled = false
"""

# uWSGI closes each connection after its answer: a connection that Apache keeps would end in a 502.
_APACHE_CONF: Final = """
{modules}
ServerRoot {directory}
ServerName {address}
DefaultRuntimeDir {directory}
PidFile {directory}/apache.pid
Mutex sem
ErrorLog /dev/stderr
LogLevel warn auth_openidc:info
User nobody
Group nogroup
Listen {address}:{port}
StartServers 1
ThreadsPerChild 8
MinSpareThreads 4
MaxSpareThreads 8
MaxRequestWorkers 8
SSLEngine on
SSLCertificateFile {directory}/keystone.crt
SSLCertificateKeyFile {directory}/keystone.key
OIDCCryptoPassphrase not-used-for-access-tokens
OIDCClaimPrefix "OIDC-"
OIDCClaimDelimiter ";"
OIDCCABundlePath {directory}/issuer.crt
OIDCOAuthVerifyJwksUri {jwks_url}
OIDCOAuthRemoteUserClaim sub
ProxyPass / http://{behind}/ retry=0 disablereuse=on
<Location /v3/OS-FEDERATION/identity_providers/{provider}/protocols/openid/auth>
  AuthType oauth20
  Require claim aud:{audience}
</Location>
"""

_APPLICATION: Final = """
import sys
sys.argv = ["keystone", "--config-file", {settings!r}]
from keystone.server.wsgi import initialize_public_application
application = initialize_public_application()
"""


@dataclass(frozen=True, slots=True)
class Keystone:
    """Servers that run, and an administrator's client.

    Attributes:
        url: That guests use.
        ca_file: PEM file of the authority that has signed Apache's certificate.
    """

    namespace: str
    url: str
    ca_file: Path
    _token: str = field(repr=False)

    def add_project(self, name: str) -> str:
        """Make a project with the group of its guests, which reads the project; return the project's id."""
        domain = {"domain_id": "default"}
        project = self._send("POST", "projects", project={"name": name, **domain})["project"]["id"]
        group = self._send("POST", "groups", group={"name": f"vm-{project}", **domain})["group"]
        roles = self._send("GET", "roles?name=reader")["roles"]
        self._send("PUT", f"projects/{project}/groups/{group['id']}/roles/{roles[0]['id']}")
        return str(project)

    def write_clouds(self, path: Path, *, project: str, token_url: str) -> None:
        """Write a guest's clouds.yaml, whose cloud is `me`; nothing in the file is secret.

        Args:
            token_url: Where the guest gets its tokens.
        """
        auth = {
            "auth_url": self.url,
            "identity_provider": _PROVIDER,
            "protocol": "openid",
            "client_id": "imds",
            # The SDK would drop an empty value, and its plugin demands one.
            "client_secret": "none",
            "access_token_endpoint": token_url,
            "project_id": project,
        }
        cloud = {
            "auth_type": "v3oidcclientcredentials",
            "auth": auth,
            "cacert": str(self.ca_file),
        }
        path.write_text(yaml.safe_dump({"clouds": {"me": cloud}}))

    def trust(self, issuer: Issuer) -> None:
        """Map the issuer's tokens to users without a record, each in the group of its project."""
        provider = {"enabled": True, "remote_ids": [issuer.url], "domain_id": "default"}
        group = {"name": "vm-{1}", "domain": {"id": "default"}}
        rule = {
            "local": [{"user": {"name": "{0}", "type": "ephemeral"}, "group": group}],
            "remote": [
                {"type": "HTTP_OIDC_SUB"},
                {"type": "HTTP_OIDC_PROJECT_ID"},
                {"type": "HTTP_OIDC_ISS", "any_one_of": [issuer.url]},
                {"type": "HTTP_OIDC_AUD", "any_one_of": [AUDIENCE]},
            ],
        }
        place = f"OS-FEDERATION/identity_providers/{_PROVIDER}"
        self._send("PUT", place, identity_provider=provider)
        self._send("PUT", "OS-FEDERATION/mappings/guests", mapping={"rules": [rule]})
        self._send("PUT", f"{place}/protocols/openid", protocol={"mapping_id": "guests"})

    def _send(self, method: str, path: str, **body: object) -> dict[str, Any]:
        answer = _ask(self.namespace, method, path, body, token=self._token)
        shape: dict[str, Any] = json.loads(answer.body) if answer.body else {}
        return shape


def run_openstack(namespace: str, clouds: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the stock client in a guest's namespace."""
    return subprocess.run(
        (*within(namespace), str(_program("openstack")), "--os-cloud", "me", *words),
        env={"OS_CLIENT_CONFIG_FILE": str(clouds), "HOME": str(clouds.parent)},
        capture_output=True,
        text=True,
        timeout=_CLIENT_S * patience(),
        check=False,
    )


@contextlib.contextmanager
def open_keystone(namespace: str, address: str, issuer: Issuer) -> Iterator[Keystone]:
    """Run Keystone at an address of a namespace, with no project but the administrator's."""
    with contextlib.ExitStack() as stack:
        temporary = tempfile.TemporaryDirectory(prefix="imdst-keystone-")
        directory = Path(stack.enter_context(temporary))
        reap_at_the_end(directory=directory)
        # Apache's workers are `nobody`, and read the issuer's certificate here.
        directory.chmod(0o755)
        shutil.copytree(_template(), directory, dirs_exist_ok=True)
        shutil.copy(issuer.ca_file, directory / "issuer.crt")
        authority = make_authority(directory, "ca")
        authority.issue("keystone", names=[f"IP:{address}"])
        url = f"https://{address}:{_PORT}"
        settings = _write_settings(directory, url)
        keystone = _keystone_server(namespace, directory, settings)
        apache = _apache_server(namespace, directory, address, issuer)
        for server in (keystone, apache):
            stack.callback(server.stop)
            server.launch()
        for server in (keystone, apache):
            server.wait_up()
        made = Keystone(namespace, f"{url}/v3", authority.ca_file, _log_in(namespace))
        made.trust(issuer)
        yield made


def _template() -> Path:
    """Return the directory with a new Keystone's database and keys, made once in a checkout."""
    pinned = REPOSITORY / "requirements" / "identity.txt"
    return made_once("keystone", stamp_of((Path(__file__), pinned)), _make)


def _make(path: Path) -> None:
    settings = _write_settings(path, "https://keystone.invalid")
    account = ("--keystone-user", "root", "--keystone-group", "root")
    for words in (
        ("db_sync",),
        ("fernet_setup", *account),
        ("credential_setup", *account),
        ("bootstrap", "--bootstrap-password", _PASSWORD),
    ):
        program = str(_program("keystone-manage"))
        run(program, "--config-file", str(settings), *words, timeout_s=_MANAGE_S)


def _write_settings(directory: Path, url: str) -> Path:
    path = directory / "keystone.conf"
    path.write_text(_KEYSTONE_CONF.format(directory=directory, url=url))
    return path


def _keystone_server(namespace: str, directory: Path, settings: Path) -> Server:
    application = directory / "application.py"
    application.write_text(_APPLICATION.format(settings=str(settings)))
    words = (
        *("--http-socket", _BEHIND, "--add-header", "Connection: close"),
        *("--virtualenv", str(pinned_venv("identity"))),
        *("--wsgi-file", str(application), "--need-app"),
        *("--processes", "1", "--threads", "4", "--buffer-size", "65535", "--die-on-term"),
    )
    return Server(
        name="Keystone",
        argv=[*ends_with_us(), *within(namespace), str(_program("uwsgi")), *words],
        cwd=directory,
        environment={},
        log=directory / "keystone.log",
        is_up=lambda: _answers(namespace),
    )


def _apache_server(namespace: str, directory: Path, address: str, issuer: Issuer) -> Server:
    modules = Path("/usr/lib/apache2/modules")
    settings = directory / "apache.conf"
    settings.write_text(
        _APACHE_CONF.format(
            modules="\n".join(
                f"LoadModule {name}_module {modules}/mod_{name}.so" for name in _MODULES
            ),
            directory=directory,
            address=address,
            port=_PORT,
            jwks_url=issuer.jwks_url,
            behind=_BEHIND,
            provider=_PROVIDER,
            audience=AUDIENCE,
        )
    )
    words = ("/usr/sbin/apache2", "-D", "FOREGROUND", "-f", str(settings))
    return Server(
        name="Apache",
        argv=[*ends_with_us(), *within(namespace), *words],
        cwd=directory,
        environment={},
        log=directory / "apache.log",
        is_up=lambda: _listens(namespace, address),
    )


def _listens(namespace: str, address: str) -> bool:
    try:
        inside(namespace, lambda: socket.create_connection((address, _PORT), 5)).close()
    except OSError:
        return False
    return True


def _answers(namespace: str) -> bool:
    try:
        return _ask(namespace, "GET", "") is not None
    except OSError:
        return False


def _log_in(namespace: str) -> str:
    """Return a token of the administrator."""
    domain = {"id": "default"}
    user = {"name": "admin", "domain": domain, "password": _PASSWORD}
    body = {
        "identity": {"methods": ["password"], "password": {"user": user}},
        "scope": {"project": {"name": "admin", "domain": domain}},
    }
    token = _ask(namespace, "POST", "auth/tokens", {"auth": body}).header("X-Subject-Token")
    assert token is not None
    return token


def _ask(
    namespace: str,
    method: str,
    path: str,
    body: Mapping[str, object] | None = None,
    *,
    token: str = "",
) -> Answer:
    """Ask Keystone itself, behind Apache, and fail unless Keystone does what it is asked."""
    answer = ask(
        f"http://{_BEHIND}",
        method,
        f"/v3/{path}",
        headers=(("Content-Type", "application/json"), ("X-Auth-Token", token)),
        body=json.dumps(body).encode() if body else None,
        namespace=namespace,
    )
    assert answer.status < http.client.BAD_REQUEST, f"{method} {path}: {answer}"
    return answer


def _program(name: str) -> Path:
    return pinned_venv("identity") / "bin" / name
