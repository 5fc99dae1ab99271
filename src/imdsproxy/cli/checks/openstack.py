"""What a host must have before imdsproxy stands in front of Nova: secrets, certificates, endpoints, the socket.

What is repaired on another host, or by waiting, is a warning: `run` starts without it, and serves once it is there.
"""

from __future__ import annotations

import socket
import ssl
import stat
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from imdsproxy.cli.checks import Finding, Subject, count, refused, warn, wrong
from imdsproxy.config.strict_yaml import parse_yaml
from imdsproxy.errors import (
    ConfigError,
    ConfigUnreadable,
    DataplaneError,
    HostRefused,
    LibraryMissing,
    SecretUnreadable,
)
from imdsproxy.host.files import read_secret
from imdsproxy.host.socket_file import SocketHolder, find_socket_holder
from imdsproxy.nova.settings import EndpointSetSettings, NovaUrl
from imdsproxy.nova.upstream import read_signing_secret
from imdsproxy.sources.neutron.client import require_library

_SHORT: Final = 16
"""Bytes; a guest that guesses the secret can forge every instance."""

_AT_ONCE: Final = 8
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


def check_secrets(on: Subject) -> list[Finding]:
    """Each set's secrets: readable, not empty, not open to others, and not easily guessed."""
    found: list[Finding] = []
    for where, one in _sets(on):
        secrets: list[bytes] = []
        for setting in ("secret_file", "next_secret_file"):
            path = getattr(one, setting)
            try:
                secrets += [] if path is None else [read_signing_secret(path)]
            except SecretUnreadable as error:
                found += refused(error, f"{where}.{setting}")
                continue
            if path is not None and len(secrets[-1]) < _SHORT:
                text = f"{where}.{setting}: the secret has only {len(secrets[-1])} bytes"
                hint = "a guest that guesses it can read every instance's metadata: `openssl rand -hex 32`"
                found.append(warn(text, hint))
        if len(secrets) > 1 and len(set(secrets)) == 1:
            text = f"{where}: the next secret is the same as the current one"
            found.append(warn(text, "put the new one into next_secret_file"))
    return found or _fine(on, "secrets can be read")


def check_certificates(on: Subject) -> list[Finding]:
    """Each set's files of authorities, certificate and key: readable PEM, and a key that belongs to its certificate."""
    found = [finding for where, one in _sets(on) for finding in _certificates(where, one)]
    return found or _fine(on, "certificates can be used")


def _certificates(where: str, one: EndpointSetSettings) -> Iterator[Finding]:
    key = one.client_key_file
    yield from _tried(
        f"{where}.ca_file",
        one.ca_file,
        lambda path: ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path),
    )
    try:
        if key is not None:
            read_secret(key)
    except SecretUnreadable as error:
        yield from refused(error, f"{where}.client_key_file")
        return
    yield from _tried(
        f"{where}.client_cert_file",
        one.client_cert_file,
        lambda path: ssl.create_default_context().load_cert_chain(path, key, _no_password),
    )


def _tried(setting: str, path: Path | None, load: Callable[[Path], None]) -> Iterator[Finding]:
    try:
        if path is not None:
            _read(path)
            load(path)
    except ConfigUnreadable as error:
        yield from refused(error, setting)
    except ssl.SSLError as error:
        words = (error.reason or str(error)).lower().replace("_", " ")
        text = f"{setting}: {path} cannot be used: {words}"
        yield wrong(text, "a PEM file is needed, and a key that belongs to it", ConfigError)


def check_clouds(on: Subject) -> list[Finding]:
    """The library of the source `neutron`, and the cloud that it names."""
    source = on.settings.sources.neutron
    try:
        if source.enabled:
            require_library()
    except LibraryMissing as error:
        return refused(error)
    return (
        []
        if source.cloud is None or not source.enabled
        else _cloud(source.cloud, source.clouds_path)
    )


def _cloud(cloud: str, path: Path) -> list[Finding]:
    try:
        data = parse_yaml(_read(path).decode("utf-8"), str(path)).value
    except UnicodeDecodeError:
        return refused(ConfigUnreadable(f"cannot read {path}: it is not UTF-8 text"))
    except ConfigError as error:
        return refused(error, "sources.neutron.clouds_file")
    clouds = data.get("clouds") if isinstance(data, dict) else None
    if not isinstance(clouds, dict) or cloud not in clouds:
        text = f"sources.neutron.cloud: {path} has no cloud {cloud}"
        return [wrong(text, "add it under `clouds:`", ConfigError)]
    if path.stat().st_mode & stat.S_IRWXO and (secret := next(_secret_keys(data), None)):
        text = f"every user of this host can read {path}, which holds a secret ({secret})"
        return [warn(text, f"chmod o-rwx {path}")]
    return [Finding(f"cloud {cloud} of {path}")]


def _secret_keys(data: object) -> Iterator[str]:
    """The keys with a secret in a clouds.yaml; with `auth_type: none` there need be none."""
    for key, value in data.items() if isinstance(data, dict) else ():
        if value and any(word in str(key) for word in _SECRETS) and not isinstance(value, dict):
            yield str(key)
        yield from _secret_keys(value)


def check_endpoints(on: Subject) -> list[Finding]:
    """Whether each endpoint can be reached, as far as its certificate."""
    timeout_s = on.settings.nova.connect_timeout_s
    places: list[str] = []
    ways: list[tuple[NovaUrl, ssl.SSLContext | None, str]] = []
    for where, one in _sets(on):
        try:
            context = _tls_context(one)
        except OSError:
            continue  # reported by check_certificates
        for number, endpoint in enumerate(one.endpoints):
            name = one.server_name or endpoint.url.host
            places.append(f"{where}.endpoints[{number}]")
            ways.append((endpoint.url, context, name))
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        reasons = list(pool.map(lambda way: _why_unreachable(timeout_s, *way), ways))
    found = [
        warn(
            f"{place}: {url}: {reason}",
            "until it can be reached, guests are answered by the set's others, or with 503",
        )
        for place, (url, _, _), reason in zip(places, ways, reasons, strict=True)
        if reason is not None
    ]
    fine = f"{count(len(ways), 'endpoint')} can be reached"
    return found or ([Finding(fine)] if ways else [])


def _tls_context(one: EndpointSetSettings) -> ssl.SSLContext | None:
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


def _why_unreachable(
    timeout_s: float, url: NovaUrl, context: ssl.SSLContext | None, name: str
) -> str | None:
    """Why there is no connection; for https with all that a request would need."""
    try:
        with socket.create_connection((url.host, url.port), timeout_s) as plain:
            if context is not None:
                with context.wrap_socket(plain, server_hostname=name):
                    pass
    except TimeoutError:
        return f"no answer within {timeout_s:g} s"
    except OSError as error:
        return getattr(error, "verify_message", "") or error.strerror or str(error)
    return None


def check_unix_listener(
    on: Subject, find: Callable[[Path], SocketHolder | None] = find_socket_holder
) -> list[Finding]:
    """That no other process listens at the path of the listener `unix`; an agent that still does is a warning.

    Where the path is to be taken over it is always a warning: imdsproxy can serve guests then, and
    the operator should see from which process it takes the path.
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
        return [Finding(f"no process listens at {path}")]
    # Our HAProxy's configuration stands in its command line.
    if str(on.layout.config) in holder.command:
        return [Finding(f"imdsproxy's HAProxy listens at {path} (pid {holder.pid})")]
    words = " ".join(holder.command)
    agent = next((name for mark, name in _AGENTS.items() if mark in words), None)
    who = agent or words[:80] or "a process that cannot be seen"
    number = "" if holder.pid is None else f" (pid {holder.pid})"
    text = f"unix_listener.path: {who}{number} listens at {path}"
    if not settings.take_over and agent is None:
        return [wrong(text, "stop it, or change unix_listener.path", HostRefused)]
    # As it is on the day of the move: both run for a moment, and going back is starting the agent again.
    hint = (
        f"guests are its own until you stop {agent}; imdsproxy takes its place within a second then"
    )
    if settings.take_over:
        starts = (
            f"as it starts, and each time that {agent or 'it'} starts (unix_listener.take_over)"
        )
        hint = f"imdsproxy takes the path over {starts}"
    return [warn(text, hint)]


def _no_password() -> str:
    """HAProxy cannot be asked for one, and the terminal must not be."""
    return ""


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigUnreadable(f"cannot read {path}: {error.strerror}") from error


def _sets(on: Subject) -> Iterator[tuple[str, EndpointSetSettings]]:
    for name, one in on.settings.nova.endpoint_sets.items():
        yield f"nova.endpoint_sets.{name}", one


def _fine(on: Subject, text: str) -> list[Finding]:
    return [Finding(text)] if on.settings.nova.endpoint_sets else []
