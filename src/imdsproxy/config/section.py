"""What a section of the settings is made of: fields with reasons, types that say what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    Strict,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from imdsproxy.core.model import ID_PATTERN

_MAX_PORT: Final = 65535


class Change(StrEnum):
    """What a changed setting takes, from the least to the most."""

    NOTHING = "nothing"
    """The new value is only looked at where it is used next: no running part keeps a copy."""

    LIVE = "live"
    """The controller takes it over at once; no request is disturbed."""

    RELOAD = "reload"
    """HAProxy is reloaded without losing a request."""

    RESTART = "restart"
    """The process concerned has to be started again; until then the old value stays in force."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A numeric address and a TCP port; `str` gives `127.0.0.1:9465` or `[::1]:9465`."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_endpoint(text: str) -> Endpoint:
    """Read `ADDRESS:PORT` or `[ADDRESS]:PORT`.

    Link-local addresses are the guests' (169.254.169.254 is one), a wildcard would answer on the
    interfaces that listeners sit on: neither can keep operators' figures away from guests.

    Raises:
        ValueError: What is wrong, in words for the operator.
    """
    host, separator, port = text.rpartition(":")
    if not separator or not (port.isascii() and port.isdigit()):
        raise ValueError("has no port")
    if not 0 < int(port) <= _MAX_PORT:
        raise ValueError(f"{port} is not a TCP port")
    bracketed = host.startswith("[") and host.endswith("]")
    try:
        address = ip_address(host[1:-1] if bracketed else host)
    except ValueError:
        raise ValueError(f"{host!r} is not an IP address") from None
    if isinstance(address, IPv6Address) != bracketed:
        raise ValueError("an IPv6 address stands in brackets, an IPv4 address does not")
    if address.is_link_local:
        raise ValueError(f"{address} is link-local: guests could reach it")
    if address.is_unspecified:
        raise ValueError(f"{address} listens everywhere: guests could reach it")
    if address.is_multicast:
        raise ValueError(f"{address} is a multicast address")
    return Endpoint(str(address), int(port))


def _absolute(path: Path) -> Path:
    if not path.is_absolute():
        raise ValueError(f"{path} is not an absolute path")
    return path


def parsed_by(parse: Callable[[str], object]) -> BeforeValidator:
    """For a setting that is written as one text; `parse` raises ValueError in words for the operator."""
    return BeforeValidator(lambda value: parse(value) if isinstance(value, str) else value)


FORMS: dict[str, str] = {
    "path": "an absolute path",
    "endpoint": "an address of the host and a port, as 127.0.0.1:9465 or [::1]:9465",
    "nova-url": "a URL that ends after the port, as http://192.0.2.10:8775 or https://[2001:db8::1]",
}
"""What a text takes, in words, by its pattern or format in the JSON Schema."""


def form(pattern: str, words: str) -> Any:  # noqa: ANN401 - as pydantic's Field
    """A text of this pattern, which `words` describe to an operator."""
    FORMS[pattern] = words
    return Field(pattern=pattern)


_T = TypeVar("_T")
Listed = Annotated[tuple[_T, ...], Strict(strict=False)]
"""YAML and JSON have lists."""

OffIsFalse = BeforeValidator(lambda value: "off" if value is False else value)
"""For words of which one is `off`: without quotes it is false in YAML 1.1, and nothing else can be meant."""

AbsolutePath = Annotated[Path, Strict(strict=False), AfterValidator(_absolute)]
HostEndpoint = Annotated[
    Endpoint,
    parsed_by(parse_endpoint),
    PlainSerializer(str, return_type=str),
    WithJsonSchema(
        {"type": "string", "format": "endpoint", "examples": ["127.0.0.1:9465", "[::1]:9465"]}
    ),
]
Identifier = Annotated[
    str,
    form(
        ID_PATTERN,
        "an id: 1 to 64 letters, digits, dots, hyphens and underscores, a letter or digit first",
    ),
]
AccountName = Annotated[str, form(r"^[a-z_][a-z0-9_-]{0,30}\$?$", "an account name")]
AccountNameOrId = Annotated[
    str,
    form(r"^([a-z_][a-z0-9_-]{0,30}\$?|[0-9]{1,10})$", "an account name, or its number in quotes"),
]
Mode = Annotated[str, form(r"^0?[0-7]{3}$", 'three octal digits in quotes, as "0660"')]
UnitName = Annotated[
    str, form(r"^[A-Za-z0-9:_.@-]{1,200}\.service$", "a systemd unit, as `name.service`")
]


def setting(default: object, change: Change, **limits: Any) -> Any:  # noqa: ANN401 - as pydantic's Field
    """One field, which the docstring below it describes; its type is the one that it stands beside.

    The limits are pydantic's own, the first of its `examples` goes into the sample; a `description` is computed.
    """
    return Field(default=default, json_schema_extra={"change": change.value}, **limits)


def section(model: type[Section]) -> Any:  # noqa: ANN401 - as above
    """A section inside another, with its own defaults."""
    return Field(default_factory=model)


class Section(BaseModel):
    """What all sections share: frozen, no unknown keys, no silent conversions.

    What does not go together inside one, it refuses in `model_post_init`.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        validate_default=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


def cross(field: str | Sequence[str], reason: str, hint: str) -> PydanticCustomError:
    """Two settings that do not go together, reported at the one that `field` names, or its steps lead to."""
    steps = (field,) if isinstance(field, str) else field
    return PydanticCustomError(
        "cross", "{reason}", {"field": steps, "reason": reason, "hint": hint}
    )
