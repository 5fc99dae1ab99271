"""Settings of the upstream `nova`: the metadata APIs, and how HAProxy reaches them."""

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Annotated, Final, Literal
from urllib.parse import urlsplit

from pydantic import PlainSerializer, WithJsonSchema

from imdsproxy.config.section import (
    AbsolutePath,
    Change,
    Endpoint,
    Identifier,
    Listed,
    Section,
    cross,
    form,
    parsed_by,
    setting,
)

NOVA_METADATA_PORT: Final = 8775
"""Nova's default `metadata_listen_port` (nova/conf/api.py)."""

_NAME: Final = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)(?:\.(?!-)[A-Za-z0-9-]{1,63}(?<!-))*\.?")
_NAME_LENGTH: Final = 253
_ADDRESS_V4: Final = re.compile(r"[0-9.]+")
_ITSELF: Final = frozenset({"169.254.169.254", "fe80::a9fe:a9fe"})


@dataclass(frozen=True, slots=True)
class NovaUrl:
    """Scheme, host (a name, IPv4, or IPv6 without brackets) and TCP port."""

    scheme: Literal["http", "https"]
    host: str
    port: int

    @property
    def authority(self) -> str:
        """Return `host:port`, as in a Host header."""
        return str(Endpoint(self.host, self.port))

    @property
    def address(self) -> IPv4Address | IPv6Address | None:
        """Return `host` as an address; `None` if it is a name."""
        try:
            return ip_address(self.host)
        except ValueError:
            return None

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}"


def parse_nova_url(text: str) -> NovaUrl:
    """Parse `http://HOST[:PORT]` or `https://HOST[:PORT]`; an IPv6 address needs brackets.

    Raises `ValueError`: the text is invalid; the message is meant for the operator.
    """
    if not all("!" <= letter <= "~" for letter in text):  # urlsplit drops some silently
        raise ValueError("must not hold blanks or letters that are not ASCII")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"is not a URL: {error}") from None
    if parts.scheme not in {"http", "https"}:
        raise ValueError("must begin with http:// or https://")
    if parts.username is not None or parts.password is not None:
        raise ValueError("must not hold a user or password: requests are signed instead")
    if parts.path not in {"", "/"} or parts.query or parts.fragment or "?" in text or "#" in text:
        raise ValueError("must end after the port: guests' paths are sent as they are")
    host = parts.hostname or ""
    if port == 0 or parts.netloc.endswith(":"):
        raise ValueError("has no TCP port after the colon")
    host = _parse_host(host, bracketed=parts.netloc.startswith("["))
    if host in _ITSELF:
        raise ValueError(f"{host} is the metadata address: requests would come back to imdsproxy")
    if host in {"0.0.0.0", "::"}:  # noqa: S104 - refused, not bound
        raise ValueError(f"{host} is not an address to connect to")
    scheme: Literal["http", "https"] = "https" if parts.scheme == "https" else "http"
    return NovaUrl(scheme, host, NOVA_METADATA_PORT if port is None else port)


def _parse_host(text: str, *, bracketed: bool) -> str:
    if not bracketed and not _ADDRESS_V4.fullmatch(text):
        if not _NAME.fullmatch(text) or len(text) > _NAME_LENGTH:
            raise ValueError(f"{text!r} is neither a name nor an address")
        return text
    try:
        # IPv4Address refuses leading zeros, which some programs read as octal.
        address = IPv6Address(text) if bracketed else IPv4Address(text)
    except ValueError:
        raise ValueError(f"{text!r} is not an IPv{6 if bracketed else 4} address") from None
    if "%" in text:
        raise ValueError("must not name a device: give an address that is the same everywhere")
    return str(address)


DEFAULT_SET = "default"
"""Endpoint set of every instance that no other set names."""


Url = Annotated[
    NovaUrl,
    parsed_by(parse_nova_url),
    PlainSerializer(str, return_type=str),
    WithJsonSchema(
        {"type": "string", "format": "nova-url", "examples": ["http://192.0.2.10:8775"]}
    ),
]
SetName = Annotated[
    str,
    form(
        r"^[a-z0-9][a-z0-9-]{0,31}$",
        "1 to 32 lower-case letters, digits and hyphens, no hyphen first",
    ),
]
HostHeader = Annotated[
    str,
    form(
        r"^[A-Za-z0-9.:\[\]-]{1,255}$",
        "a host as in a Host header: a name or an address, and a port",
    ),
]
ServerName = Annotated[str, form(r"^[A-Za-z0-9.-]{1,253}$", "a host's name")]


class NovaEndpointSettings(Section):
    """Endpoint of a Nova metadata API."""

    url: Url = setting(..., Change.RELOAD)
    """`http://HOST:PORT` or `https://HOST:PORT`; HOST is a name, an IPv4 address or an IPv6 address in brackets, PORT
    is 8775 by default. imdsproxy resolves a name again every half minute, and each of its addresses is one endpoint.
    """

    secret: Literal["current", "next"] = setting("current", Change.RELOAD)
    """Secret that this Nova has: the set's current or next one. During a change of secrets, Nova hosts take over the
    next secret one after another, and this setting shows which ones have it.
    """


class EndpointSetSettings(Section):
    """Nova metadata APIs that know the same instances: those of one cell, or of all."""

    endpoints: Listed[NovaEndpointSettings] = setting(
        ..., Change.RELOAD, min_length=1, max_length=32
    )
    """Metadata APIs; requests are spread over those that answer."""

    secret_file: AbsolutePath = setting(..., Change.RELOAD)
    """File of the secret that signs requests: Nova's `[neutron] metadata_proxy_shared_secret`. Surrounding blanks are
    ignored; an empty file is refused. Read at start and at each reload.
    """

    next_secret_file: AbsolutePath | None = setting(None, Change.RELOAD)
    """File of the secret that will replace the current one. While it is set, records carry both signatures."""

    networks: Listed[Identifier] = setting((), Change.RELOAD)
    """Networks and routers whose guests use this set. They take precedence over projects."""

    projects: Listed[Identifier] = setting((), Change.RELOAD)
    """Projects whose instances use this set."""

    ca_file: AbsolutePath | None = setting(None, Change.RELOAD)
    """PEM file of the authorities that may have signed the certificates of https endpoints; null takes the system's.
    Read again at each reload, even if only the file has changed.
    """

    verify: bool = setting(True, Change.RELOAD)
    """Check certificate and name of https endpoints. Without the check, any system in between can read and change
    metadata."""

    server_name: ServerName | None = setting(None, Change.RELOAD)
    """Name in the certificates of https endpoints; null takes the host of the first URL. Required if that host is an
    address, because HAProxy compares only names.
    """

    client_cert_file: AbsolutePath | None = setting(None, Change.RELOAD)
    """PEM file of the client certificate for https endpoints; it may contain the key. Read again at each reload."""

    client_key_file: AbsolutePath | None = setting(None, Change.RELOAD)
    """PEM file of the client certificate's key; null if the certificate's file contains it."""

    host: HostHeader | None = setting(None, Change.RELOAD)
    """Host header that Nova gets; null takes host and port of the set's first endpoint. The guest's own Host header is
    never sent.
    """

    def model_post_init(self, _: object) -> None:
        """Check that related settings are complete, and that the endpoints are consistent."""
        if self.client_key_file is not None and self.client_cert_file is None:
            raise cross("client_key_file", "needs client_cert_file", "give both or neither")
        if self.next_secret_file is None and any(one.secret == "next" for one in self.endpoints):  # noqa: S105 - which one, not what
            raise cross(
                "next_secret_file",
                "is missing, and an endpoint has the next secret",
                "name the file, or `secret: current` at every endpoint",
            )
        if self.next_secret_file == self.secret_file:
            raise cross(
                "next_secret_file", "is the same file as secret_file", "a file of its own, or null"
            )
        if len({one.url for one in self.endpoints}) < len(self.endpoints):
            raise cross("endpoints", "a URL appears twice", "list each URL once")
        if len({one.url.scheme for one in self.endpoints}) > 1:
            raise cross(
                "endpoints", "http and https are mixed", "use one of them for the whole set"
            )
        first = self.endpoints[0].url
        if first.scheme == "https" and first.address and self.verify and not self.server_name:
            raise cross(
                "server_name",
                f"is missing: certificates are compared with names, and {first.host} is none",
                "the name in the endpoints' certificates",
            )


_EXAMPLE: Final = {
    "endpoints": [{"url": "http://192.0.2.10:8775"}],
    "secret_file": "/etc/imdsproxy/nova.secret",
}


class NovaSettings(Section):
    """Nova's metadata APIs, for instances whose documents come from Nova."""

    endpoint_sets: dict[SetName, EndpointSetSettings] = setting(
        {}, Change.RELOAD, examples=[{DEFAULT_SET: _EXAMPLE}]
    )
    """Endpoint sets by name; empty without Nova. `default` serves every instance that no other set names. Cells with
    their own metadata APIs need a set each.
    """

    connect_timeout_s: float = setting(2.0, Change.RELOAD, ge=0.1, le=30)
    """Seconds to wait for a connection before HAProxy tries another endpoint."""

    response_timeout_s: float = setting(30.0, Change.RELOAD, ge=1, le=600)
    """Seconds to wait for Nova's answer; then the guest gets 503 and Retry-After. Shorter than the 32 s of a Neutron
    proxy in front, long enough for dynamic vendor data.
    """

    health_check: Literal["tcp", "http", "off"] = setting("http", Change.RELOAD)
    """Health check of endpoints. `http` requests `/`, which Nova answers unsigned and without its database: no answer
    within 3 s (or `response_timeout_s`), or a 5xx, twice in a row means down. `tcp` only connects; it leaves no line in
    Nova's log, but takes a hung Nova for healthy. `off` learns from failed requests only.
    """

    health_check_interval_s: float = setting(5.0, Change.RELOAD, ge=0.1, le=300)
    """Seconds between two checks of an endpoint, varied at random by a quarter, because all hosts check every endpoint.
    After a failed check, half a second.
    """

    def model_post_init(self, _: object) -> None:
        """Check that each instance belongs to exactly one set."""
        if self.endpoint_sets and DEFAULT_SET not in self.endpoint_sets:
            raise cross(
                "endpoint_sets",
                "has no set `default`, so instances without a set could not be served",
                "name one set default",
            )
        seen: dict[tuple[str, str], str] = {}
        for name, one in self.endpoint_sets.items():
            for kind, ids in (("network", one.networks), ("project", one.projects)):
                for each in ids:
                    other = seen.setdefault((kind, each), name)
                    if other != name:
                        raise cross(
                            ("endpoint_sets", name, f"{kind}s"),
                            f"{kind} {each} is in {other} too",
                            "keep it in one set",
                        )
