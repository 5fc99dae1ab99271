"""What a host must have before imdsproxy stands in front of Nova: secrets, certificates, endpoints, the socket.

What is repaired on another host, or by waiting, is a warning: `run` starts without it, and serves once it is there.
"""

from __future__ import annotations

import ssl
import stat
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from imdsproxy.cli.checks.finding import Area, Finding
from imdsproxy.config.schema import Settings
from imdsproxy.config.strict_yaml import parse_yaml
from imdsproxy.errors import (
    ConfigError,
    ConfigUnreadable,
    HostRefused,
    ImdsproxyError,
    LibraryMissing,
    SecretUnreadable,
)
from imdsproxy.host.files import read_secret
from imdsproxy.host.socket_file import SocketHolder
from imdsproxy.nova.settings import EndpointSetSettings, NovaUrl
from imdsproxy.nova.upstream import read_signing_secret
from imdsproxy.sources.neutron.client import require_library

_NOVA: Final = Area("nova")
_NEUTRON: Final = Area("neutron")
_UNIX_LISTENER: Final = Area("unix listener")

_SHORT: Final = 16
"""Bytes; a guest that guesses the secret can forge every instance."""

_AT_ONCE: Final = 8
_UNREACHED: Final = "until it can be reached, guests are answered by the set's others, or with 503"
_AGENTS: Final[Mapping[str, str]] = {
    "neutron-metadata-agent": "neutron-metadata-agent",
    "neutron-ovn-metadata-agent": "neutron-ovn-metadata-agent",
    "neutron-ovn-agent": "neutron-ovn-agent",
    # Its module, and its file of options, however it is started.
    "metadata_agent": "neutron-metadata-agent",
}
"""Agents of Neutron by what is in their command line."""
_SECRETS: Final = ("password", "secret", "passcode", "token")
"""What is in the name of each of keystoneauth's options that is a secret."""
_SETS: Final = "nova.endpoint_sets"


def check_secrets(settings: Settings) -> list[Finding]:
    """Each set's secrets: readable, not empty, not open to others, and not easily guessed."""
    found: list[Finding] = []
    for name, one in settings.nova.endpoint_sets.items():
        secrets: dict[str, bytes] = {}
        for setting, path in (
            ("secret_file", one.secret_file),
            ("next_secret_file", one.next_secret_file),
        ):
            if path is None:
                continue
            try:
                secrets[setting] = read_signing_secret(path)
            except SecretUnreadable as error:
                found += _named(f"{_SETS}.{name}.{setting}", error)
        found += _weak(name, secrets)
    return found or _fine(settings, "secrets can be read")


def check_certificates(settings: Settings) -> list[Finding]:
    """Each set's files of authorities, certificate and key: readable PEM, and a key that belongs to its certificate."""
    found = [
        finding
        for name, one in settings.nova.endpoint_sets.items()
        for finding in _certificates(name, one)
    ]
    return found or _fine(settings, "certificates can be used")


def check_clouds(settings: Settings) -> list[Finding]:
    """The library of the source `neutron`, and the cloud that it names."""
    source = settings.sources.neutron
    if not source.enabled:
        return []
    try:
        require_library()
    except LibraryMissing as error:
        return _NEUTRON.of(error)
    return [] if source.cloud is None else _cloud(source.cloud, source.clouds_path)


def _cloud(cloud: str, path: Path) -> list[Finding]:
    try:
        data = parse_yaml(_read(path).decode("utf-8"), str(path)).value
    except UnicodeDecodeError:
        return _NEUTRON.of(ConfigUnreadable(f"cannot read {path}: it is not UTF-8 text"))
    except ConfigError as error:
        return _named("sources.neutron.clouds_file", error, _NEUTRON)
    clouds = data.get("clouds") if isinstance(data, dict) else None
    if not isinstance(clouds, dict) or cloud not in clouds:
        text = f"sources.neutron.cloud: {path} has no cloud {cloud}"
        return [_NEUTRON.wrong(text, "add it under `clouds:`", ConfigError)]
    if path.stat().st_mode & stat.S_IRWXO and (secret := _secret_key(data)):
        text = f"every user of this host can read {path}, which holds a secret ({secret})"
        return [_NEUTRON.warn(text, f"chmod o-rwx {path}")]
    return [_NEUTRON.ok(f"cloud {cloud} of {path}")]


def _secret_key(data: object) -> str | None:
    """The first key with a secret in a clouds.yaml; with `auth_type: none` there need be none."""
    if not isinstance(data, dict):
        return None
    for key, value in data.items():
        if value and any(word in str(key) for word in _SECRETS) and not isinstance(value, dict):
            return str(key)
        found = _secret_key(value)
        if found is not None:
            return found
    return None


def check_endpoints(
    settings: Settings, reach: Callable[[NovaUrl, ssl.SSLContext | None, str], str | None]
) -> list[Finding]:
    """Whether each endpoint can be reached, as far as its certificate.

    Args:
        settings: All of them.
        reach: Tries, with TLS where there is a context, and the name for it; the reason why not, or `None`.
    """
    places: list[str] = []
    ways: list[tuple[NovaUrl, ssl.SSLContext | None, str]] = []
    for name, one in settings.nova.endpoint_sets.items():
        try:
            context = tls_context(one)
        except OSError:
            continue  # reported by check_certificates
        for number, endpoint in enumerate(one.endpoints):
            places.append(f"{_SETS}.{name}.endpoints[{number}]")
            ways.append((endpoint.url, context, one.server_name or endpoint.url.host))
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        reasons = list(pool.map(lambda way: reach(*way), ways))
    found = [
        _NOVA.warn(f"{place}: {url}: {reason}", _UNREACHED)
        for place, (url, _, _), reason in zip(places, ways, reasons, strict=True)
        if reason is not None
    ]
    count = len(ways)
    return found or (
        [_NOVA.ok(f"{count} endpoint{'' if count == 1 else 's'} can be reached")] if count else []
    )


def check_unix_listener(
    settings: Settings, find: Callable[[Path], SocketHolder | None], haproxy_config: Path
) -> list[Finding]:
    """That no other process listens at the path of the listener `unix`; an agent that still does is a warning.

    Where the path is to be taken over it is always a warning: imdsproxy can serve guests then, and
    the operator should see from which process it takes the path.

    Args:
        settings: All of them.
        find: The process that listens at a path.
        haproxy_config: Our HAProxy's; it stands in that one's command line.
    """
    if not settings.unix_listener.enabled:
        return []
    path = settings.unix_listener.path
    listener = find(path)
    if listener is None:
        return [_UNIX_LISTENER.ok(f"no process listens at {path}")]
    if str(haproxy_config) in listener.command:
        return [_UNIX_LISTENER.ok(f"imdsproxy's HAProxy listens at {path} (pid {listener.pid})")]
    words = " ".join(listener.command)
    agent = next((name for mark, name in _AGENTS.items() if mark in words), None)
    who = agent or words[:80] or "a process that cannot be seen"
    number = "" if listener.pid is None else f" (pid {listener.pid})"
    text = f"unix_listener.path: {who}{number} listens at {path}"
    if settings.unix_listener.take_over:
        hint = (
            f"imdsproxy takes the path over as it starts, and each time that {agent or 'it'} starts"
        )
        return [_UNIX_LISTENER.warn(text, f"{hint} (unix_listener.take_over)")]
    if agent is not None:
        # As it is on the day of the move: both run for a moment, and going back is starting it again.
        hint = f"guests are its own until you stop {agent}; imdsproxy takes its place within a second then"
        return [_UNIX_LISTENER.warn(text, hint)]
    return [_UNIX_LISTENER.wrong(text, "stop it, or change unix_listener.path", HostRefused)]


def tls_context(one: EndpointSetSettings) -> ssl.SSLContext | None:
    """How the set's https endpoints are to be reached; `None` for http.

    Raises:
        OSError: A file of it cannot be read, or is no PEM file (`ssl.SSLError` is one).
    """
    if one.endpoints[0].url.scheme == "http":
        return None
    context = ssl.create_default_context(cafile=None if one.ca_file is None else str(one.ca_file))
    if not one.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if one.client_cert_file is not None:
        context.load_cert_chain(one.client_cert_file, one.client_key_file, _no_password)
    return context


def _certificates(name: str, one: EndpointSetSettings) -> Iterator[Finding]:
    where = f"{_SETS}.{name}"
    if one.ca_file is not None:
        yield from _tried(f"{where}.ca_file", one.ca_file, _load_authorities)
    if one.client_key_file is not None:
        try:
            read_secret(one.client_key_file)
        except SecretUnreadable as error:
            yield from _named(f"{where}.client_key_file", error)
            return
    if one.client_cert_file is not None:
        yield from _tried(
            f"{where}.client_cert_file",
            one.client_cert_file,
            lambda path: ssl.create_default_context().load_cert_chain(
                path, one.client_key_file, _no_password
            ),
        )


def _load_authorities(path: Path) -> None:
    ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)


def _tried(setting: str, path: Path, load: Callable[[Path], None]) -> Iterator[Finding]:
    try:
        _read(path)
        load(path)
    except ConfigUnreadable as error:
        yield from _named(setting, error)
    except ssl.SSLError as error:
        words = (error.reason or str(error)).lower().replace("_", " ")
        text = f"{setting}: {path} cannot be used: {words}"
        yield _NOVA.wrong(text, "a PEM file is needed, and a key that belongs to it", ConfigError)


def _no_password() -> str:
    """HAProxy cannot be asked for one, and the terminal must not be."""
    return ""


def _weak(name: str, secrets: Mapping[str, bytes]) -> Iterator[Finding]:
    for setting, secret in secrets.items():
        if len(secret) < _SHORT:
            text = f"{_SETS}.{name}.{setting}: the secret has only {len(secret)} bytes"
            hint = (
                "a guest that guesses it can read every instance's metadata: `openssl rand -hex 32`"
            )
            yield _NOVA.warn(text, hint)
    if len(secrets) > 1 and len(set(secrets.values())) == 1:
        text = f"{_SETS}.{name}: the next secret is the same as the current one"
        yield _NOVA.warn(text, "put the new one into next_secret_file")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigUnreadable(f"cannot read {path}: {error.strerror}") from error


def _named(setting: str, error: ImdsproxyError, area: Area = _NOVA) -> list[Finding]:
    return [area.wrong(f"{setting}: {error.message}", error.hint, error)]


def _fine(settings: Settings, text: str) -> list[Finding]:
    return [_NOVA.ok(text)] if settings.nova.endpoint_sets else []
