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
from collections.abc import Iterator, Mapping, Sequence
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
_LOADED: Final = (
    "mpm_event",
    "authn_core",
    "authz_core",
    "authz_user",
    "socache_shmcb",
    "ssl",
    "proxy",
    "proxy_http",
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
[cache]
enabled = false
{more}
"""

_METHODS: Final = """
[auth]
methods = password,token,openid
[openid]
remote_id_attribute = HTTP_OIDC_ISS
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
LogLevel warn
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
ProxyPass / http://{behind}/ retry=0 disablereuse=on
{more}
"""

_TRUST: Final = """
LoadModule auth_openidc_module {modules}/mod_auth_openidc.so
OIDCCryptoPassphrase not-used-for-access-tokens
OIDCClaimPrefix "OIDC-"
OIDCClaimDelimiter ";"
OIDCCABundlePath {directory}/issuer.crt
OIDCOAuthVerifyJwksUri {jwks_url}
OIDCOAuthRemoteUserClaim sub
<Location /v3/OS-FEDERATION/identity_providers/{provider}/protocols/openid/auth>
  AuthType oauth20
  Require claim aud:{audience}
</Location>
"""

_APPLICATION: Final = """
import pathlib, sys
sys.argv = {argv!r}
from keystone.server.wsgi import initialize_public_application
application = initialize_public_application()
pathlib.Path({started!r}).touch()
"""

MODULES: Final = Path("/usr/lib/apache2/modules")
"""Directory of Apache's modules."""


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

    def administer(self, project: str) -> dict[str, str]:
        """Return the environment of an administrator of all projects, who works in one."""
        return {
            "OS_AUTH_URL": self.url,
            "OS_CACERT": str(self.ca_file),
            "OS_USERNAME": "admin",
            "OS_PASSWORD": _PASSWORD,
            "OS_USER_DOMAIN_ID": "default",
            "OS_PROJECT_DOMAIN_ID": "default",
            "OS_PROJECT_NAME": project,
        }

    def add_project(self, name: str) -> str:
        """Make a project with the group of its guests, which reads the project; return the project's id."""
        domain = {"domain_id": "default"}
        project = self.send("POST", "projects", project={"name": name, **domain})["project"]["id"]
        group = self.send("POST", "groups", group={"name": f"vm-{project}", **domain})["group"]
        roles = self.send("GET", "roles?name=reader")["roles"]
        self.send("PUT", f"projects/{project}/groups/{group['id']}/roles/{roles[0]['id']}")
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
        self.send("PUT", place, identity_provider=provider)
        self.send("PUT", "OS-FEDERATION/mappings/guests", mapping={"rules": [rule]})
        self.send("PUT", f"{place}/protocols/openid", protocol={"mapping_id": "guests"})

    def send(self, method: str, path: str, **body: object) -> dict[str, Any]:
        answer = _ask(self.namespace, method, path, body, token=self._token)
        shape: dict[str, Any] = json.loads(answer.body) if answer.body else {}
        return shape


def run_openstack(namespace: str, clouds: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the stock client in a guest's namespace."""
    return subprocess.run(
        (*within(namespace), str(program("openstack")), "--os-cloud", "me", *words),
        env={"OS_CLIENT_CONFIG_FILE": str(clouds), "HOME": str(clouds.parent)},
        capture_output=True,
        text=True,
        timeout=_CLIENT_S * patience(),
        check=False,
    )


@contextlib.contextmanager
def open_keystone(namespace: str, address: str, issuer: Issuer) -> Iterator[Keystone]:
    """Run Keystone at an address of a namespace, with trust in an issuer and without projects of guests."""
    with new_directory() as directory:
        shutil.copy(issuer.ca_file, directory / "issuer.crt")
        authority = make_authority(directory, "ca")
        authority.issue("keystone", names=[f"IP:{address}"])
        place = Place(directory, namespace, within(namespace), f"https://{address}:{_PORT}")
        trust = _TRUST.format(
            modules=MODULES,
            directory=directory,
            jwks_url=issuer.jwks_url,
            provider=_PROVIDER,
            audience=AUDIENCE,
        )
        keystone = place.keystone_server(_METHODS)
        with running(keystone, place.apache_server(address, trust)):
            made = Keystone(namespace, f"{place.url}/v3", authority.ca_file, log_in(namespace))
            made.trust(issuer)
            yield made


@contextlib.contextmanager
def new_directory() -> Iterator[Path]:
    """Yield a directory with a new Keystone's database and keys."""
    with tempfile.TemporaryDirectory(prefix="imdst-keystone-") as temporary:
        directory = Path(temporary)
        reap_at_the_end(directory=directory)
        # Apache's workers are `nobody`, and read the issuer's certificate here.
        directory.chmod(0o755)
        shutil.copytree(_template(), directory, dirs_exist_ok=True)
        yield directory


@contextlib.contextmanager
def running(*servers: Server) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for server in servers:
            stack.callback(server.stop)
            server.launch()
        for server in servers:
            server.wait_up()
        yield


def _template() -> Path:
    """Return the directory with a new Keystone's database and keys, made once in a checkout."""
    pinned = REPOSITORY / "requirements" / "identity.txt"
    return made_once("keystone", stamp_of((Path(__file__), pinned)), _make)


def _make(path: Path) -> None:
    settings = _write_settings(path, "https://keystone.invalid", _METHODS)
    account = ("--keystone-user", "root", "--keystone-group", "root")
    for words in (
        ("db_sync",),
        ("fernet_setup", *account),
        ("credential_setup", *account),
        ("bootstrap", "--bootstrap-password", _PASSWORD),
    ):
        run(
            str(program("keystone-manage")),
            "--config-file",
            str(settings),
            *words,
            timeout_s=_MANAGE_S,
        )


def _write_settings(directory: Path, url: str, more: str) -> Path:
    path = directory / "keystone.conf"
    path.write_text(_KEYSTONE_CONF.format(directory=directory, url=url, more=more))
    return path


@dataclass(frozen=True, slots=True)
class Place:
    """Surroundings of the two servers.

    Attributes:
        directory: With Apache's certificate and key.
        within: Words before a command that runs in the namespace.
        url: That clients use.
    """

    directory: Path
    namespace: str
    within: Sequence[str]
    url: str

    def keystone_server(self, more: str, *words: str) -> Server:
        """Return Keystone, not yet started, with more settings and words of its command line."""
        settings = _write_settings(self.directory, self.url, more)
        application = self.directory / "application.py"
        started = self.directory / "started"
        application.write_text(
            _APPLICATION.format(
                argv=["keystone", "--config-file", str(settings), *words], started=str(started)
            )
        )
        options = (
            *("--http-socket", _BEHIND, "--add-header", "Connection: close"),
            *("--virtualenv", str(pinned_venv("identity"))),
            *("--wsgi-file", str(application), "--need-app", "--master", "--lazy-apps"),
            *("--touch-workers-reload", str(application)),
            *("--processes", "1", "--threads", "4", "--buffer-size", "65535", "--die-on-term"),
        )
        return Server(
            name="Keystone",
            argv=[*ends_with_us(), *self.within, str(program("uwsgi")), *options],
            cwd=self.directory,
            environment={},
            log=self.directory / "keystone.log",
            is_up=lambda: started.exists() and _answers(self.namespace),
        )

    def apache_server(self, address: str, more: str) -> Server:
        """Return Apache in front of Keystone, not yet started, with more settings."""
        settings = self.directory / "apache.conf"
        loaded = (f"LoadModule {name}_module {MODULES}/mod_{name}.so" for name in _LOADED)
        settings.write_text(
            _APACHE_CONF.format(
                modules="\n".join(loaded),
                directory=self.directory,
                address=address,
                port=_PORT,
                behind=_BEHIND,
                more=more,
            )
        )
        words = ("/usr/sbin/apache2", "-D", "FOREGROUND", "-f", str(settings))
        return Server(
            name="Apache",
            argv=[*ends_with_us(), *self.within, *words],
            cwd=self.directory,
            environment={},
            log=self.directory / "apache.log",
            is_up=lambda: _listens(self.namespace, address),
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


def log_in(namespace: str) -> str:
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


def program(name: str) -> Path:
    return pinned_venv("identity") / "bin" / name
