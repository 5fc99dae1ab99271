"""Checks of the requirements for serving Nova's metadata: secrets, certificates, endpoints, the unix socket.

Problems to fix on another host, or by waiting, are warnings: `run` starts anyway, and serves once they are gone.
"""

import socket
import ssl
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from imdsproxy.config.nova import EndpointSetSettings, NovaUrl
from imdsproxy.config.strict_yaml import parse_yaml
from imdsproxy.errors import ConfigError, DataplaneError, LibraryMissing, spell_count
from imdsproxy.host.files import read_secret
from imdsproxy.host.socket_file import SocketHolder, find_socket_holder
from imdsproxy.nova.upstream import read_signing_secret
from imdsproxy.sources.neutron.client import require_library
from imdsproxy.tools.checks import Finding, Subject, found, refused

_SHORT: Final = 16
"""Minimum length of a secret in bytes; a guest that guesses the secret can impersonate every instance."""

_AT_ONCE: Final = 8
_AGENTS: Final = {
    "neutron-metadata-agent": "neutron-metadata-agent",
    "neutron-ovn-metadata-agent": "neutron-ovn-metadata-agent",
    "neutron-ovn-agent": "neutron-ovn-agent",
    # Module and options file of the agent, for agents that another program starts.
    "metadata_agent": "neutron-metadata-agent",
}
"""Names of Neutron agents, by a word in their command line."""

_NO_PASSWORD: Final = ""
"""Empty password for keys: HAProxy cannot use encrypted keys, and the ssl module must not prompt at the terminal."""

_SECRETS: Final = ("password", "secret", "passcode", "token")
"""Words in the names of keystoneauth's secret options."""


def check_secrets(on: Subject) -> list[Finding]:
    """Check that each endpoint set's secrets are readable, not empty, closed to other accounts and hard to guess."""
    findings: list[Finding] = []
    for where, one in _sets(on):
        secrets: list[bytes] = []
        for name in ("secret_file", "next_secret_file"):
            path, setting = getattr(one, name), f"{where}.{name}"
            if path is None:
                continue
            with _noting(findings, setting, path):
                secrets.append(read_signing_secret(path))
                if (number := len(secrets[-1])) < _SHORT:
                    findings.append(found("secret-short", setting=setting, bytes=number))
        if len(secrets) > len(set(secrets)):
            findings.append(found("secret-same", where=where))
    return findings or _fine(on, "secrets")


def check_certificates(on: Subject) -> list[Finding]:
    """Check that each endpoint set's CA, certificate and key files are readable PEM, and that the key matches."""
    findings: list[Finding] = []
    for where, one in _sets(on):
        authorities, certificate, key = one.ca_file, one.client_cert_file, one.client_key_file
        with _noting(findings, f"{where}.ca_file", authorities):
            if authorities is not None:
                authorities.read_bytes()
                ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(authorities)
        with _noting(findings, f"{where}.client_key_file", key):
            if key is not None:
                read_secret(key)
            with _noting(findings, f"{where}.client_cert_file", certificate):
                if certificate is not None:
                    certificate.read_bytes()
                    ssl.create_default_context().load_cert_chain(certificate, key, _NO_PASSWORD)
    return findings or _fine(on, "certificates")


@contextmanager
def _noting(findings: list[Finding], setting: str, path: Path | None) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        findings += refused(error, setting)
    except ssl.SSLError as error:
        reason = (error.reason or str(error)).lower().replace("_", " ")
        findings.append(found("certificate-odd", setting=setting, path=path, reason=reason))
    except OSError as error:
        findings.append(found("file-unread", setting=setting, path=path, reason=error.strerror))


def check_clouds(on: Subject) -> list[Finding]:
    source = on.settings.sources.neutron
    if not source.enabled:
        return []
    try:
        require_library()
    except LibraryMissing as error:
        return refused(error)
    return [] if source.cloud is None else _cloud(source.cloud, source.clouds_path)


def _cloud(cloud: str, path: Path) -> list[Finding]:
    findings: list[Finding] = []
    with _noting(findings, "sources.neutron.clouds_file", path):
        try:
            data = parse_yaml(path.read_bytes().decode(), str(path)).value
        except UnicodeDecodeError:
            return [found("cloud-no-text", path=path)]
        clouds = data.get("clouds") if isinstance(data, dict) else None
        if not isinstance(clouds, dict) or cloud not in clouds:
            findings.append(found("cloud-missing", path=path, cloud=cloud))
        elif path.stat().st_mode & stat.S_IRWXO and (secret := next(_secret_keys(data), None)):
            findings.append(found("cloud-shown", path=path, secret=secret))
        else:
            findings.append(found("cloud", cloud=cloud, path=path))
    return findings


def _secret_keys(data: object) -> Iterator[str]:
    """Yield the names of secret options in a clouds.yaml; `auth_type: none` needs none."""
    for key, value in data.items() if isinstance(data, dict) else ():
        if value and any(word in str(key) for word in _SECRETS) and not isinstance(value, dict):
            yield str(key)
        yield from _secret_keys(value)


def check_endpoints(on: Subject) -> list[Finding]:
    timeout_s = on.settings.nova.connect_timeout_s
    tried: list[Future[Finding | None]] = []
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for where, one in _sets(on):
            try:
                context = _tls_context(one)
            except OSError:
                continue  # check_certificates reports this error
            for number, endpoint in enumerate(one.endpoints):
                place, url = f"{where}.endpoints[{number}]", endpoint.url
                name = one.server_name or url.host
                tried.append(pool.submit(_try_endpoint, place, url, name, context, timeout_s))
    findings = [finding for one in tried if (finding := one.result()) is not None]
    fine = [found("endpoints", number=spell_count(len(tried), "endpoint"))] if tried else []
    return findings or fine


def _tls_context(one: EndpointSetSettings) -> ssl.SSLContext | None:
    """Return the TLS context of an endpoint set; `None` for http.

    Raises `OSError`: a file of the endpoint set is unreadable or not PEM (`ssl.SSLError` is an `OSError`).
    """
    if one.endpoints[0].url.scheme == "http":
        return None
    context = ssl.create_default_context(cafile=None if one.ca_file is None else str(one.ca_file))
    if not one.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if one.client_cert_file is not None:
        context.load_cert_chain(one.client_cert_file, one.client_key_file, _NO_PASSWORD)
    return context


def _try_endpoint(
    place: str, url: NovaUrl, name: str, context: ssl.SSLContext | None, timeout_s: float
) -> Finding | None:
    """Connect to an endpoint, with a TLS handshake for https; return a finding if this fails."""
    reason = ""
    try:
        with socket.create_connection((url.host, url.port), timeout_s) as plain:
            if context is not None:
                context.wrap_socket(plain, server_hostname=name).close()
    except TimeoutError:
        reason = f"no answer within {timeout_s:g} s"
    except OSError as error:
        reason = getattr(error, "verify_message", "") or error.strerror or str(error)
    return found("endpoint-silent", place=place, url=url, reason=reason) if reason else None


def check_unix_listener(
    on: Subject, find: Callable[[Path], SocketHolder | None] = find_socket_holder
) -> list[Finding]:
    """Check that no other process listens at the unix listener's path; a Neutron agent there is only a warning.

    With `take_over`, any process there is a warning: imdsproxy can serve guests, but the operator should see which
    process loses the path.
    """
    settings = on.settings.unix_listener
    if not settings.enabled:
        return []
    path = settings.path
    try:
        holder = find(path)
    except DataplaneError as error:
        return refused(error, "unix_listener.path")
    if holder is None:
        return [found("socket", path=path)]
    # Our HAProxy is identified by its configuration file in the command line.
    if str(on.layout.config) in holder.command:
        return [found("socket-ours", path=path, pid=holder.pid)]
    words = " ".join(holder.command)
    agent = next((name for mark, name in _AGENTS.items() if mark in words), "")
    process = agent or words[:80] or "an unknown process"
    if holder.pid is not None:
        process += f" (pid {holder.pid})"
    # During a migration the agent still runs for a while, so this is no error.
    name = "socket-agent" if agent else "socket-taken"
    if settings.take_over:
        name = "socket-take-over"
    return [found(name, process=process, path=path, agent=agent or "the process")]


def _sets(on: Subject) -> Iterator[tuple[str, EndpointSetSettings]]:
    for name, one in on.settings.nova.endpoint_sets.items():
        yield f"nova.endpoint_sets.{name}", one


def _fine(on: Subject, name: str) -> list[Finding]:
    return [found(name)] if on.settings.nova.endpoint_sets else []
