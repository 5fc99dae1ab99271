"""Building blocks of the settings' sections: fields with reasons, and types with messages for operators."""

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

from imdsproxy.model.entities import ID_PATTERN

_MAX_PORT: Final = 65535


class Change(StrEnum):
    """Effort to apply a changed setting, from least to most."""

    NOTHING = "nothing"
    """No running part keeps a copy: the next use reads the new value."""

    LIVE = "live"
    """The controller applies the new value at once, without disturbing a request."""

    RELOAD = "reload"
    """HAProxy is reloaded without losing a request."""

    RESTART = "restart"
    """The process concerned must be restarted; until then the old value stays in force."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A numeric address and a TCP port; `str` gives `127.0.0.1:9465` or `[::1]:9465`."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_endpoint(text: str) -> Endpoint:
    """Parse `ADDRESS:PORT` or `[ADDRESS]:PORT`.

    Link-local and wildcard addresses are refused, because guests could reach operators' figures there: link-local
    addresses are the guests' own (as 169.254.169.254), and a wildcard also listens on the interfaces of listeners.
    Raises `ValueError`: the text is not acceptable; the message is for the operator.
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
    """Build a validator for a setting written as one text; `parse` raises ValueError with a message for operators."""
    return BeforeValidator(lambda value: parse(value) if isinstance(value, str) else value)


FORMS: dict[str, str] = {
    "path": "an absolute path",
    "endpoint": "an address of the host and a port, as 127.0.0.1:9465 or [::1]:9465",
    "nova-url": "a URL that ends after the port, as http://192.0.2.10:8775 or https://[2001:db8::1]",
}
"""Accepted texts in words, by their pattern or format in the JSON Schema."""


def form(pattern: str, words: str) -> Any:
    """Build a text field with this pattern, and register `words` as its description for operators."""
    FORMS[pattern] = words
    return Field(pattern=pattern)


_T = TypeVar("_T")
Listed = Annotated[tuple[_T, ...], Strict(strict=False)]
"""A tuple that is written as a list in YAML and JSON."""

OffIsFalse = BeforeValidator(lambda value: "off" if value is False else value)
"""Validator for enumerations with the word `off`: unquoted, YAML 1.1 reads it as false, which has no other meaning."""

ApiUrl = Annotated[
    str,
    form(
        r"^https?://[^\s/?#]+/?[^\s?#]*$",
        "a URL that begins with http:// or https://, without ? and #",
    ),
]
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


def setting(default: object, change: Change, **limits: Any) -> Any:
    """Build one field. Its type stands beside it, and the docstring below it is its description.

    `limits` are pydantic's own. The first of `examples` goes into the sample; a computed `description` replaces the
    docstring.
    """
    return Field(default=default, json_schema_extra={"change": change.value}, **limits)


def section(model: type[Section]) -> Any:
    """Build the field of a section inside another section, with its own defaults."""
    return Field(default_factory=model)


class Section(BaseModel):
    """Base of all sections: frozen, no unknown keys, no silent conversions.

    A section refuses inconsistent settings in `model_post_init`.
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
    """Build the error for two inconsistent settings, reported at the field or path `field`."""
    steps = (field,) if isinstance(field, str) else field
    return PydanticCustomError(
        "cross", "{reason}", {"field": steps, "reason": reason, "hint": hint}
    )
