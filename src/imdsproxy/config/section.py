"""What a section of the settings is made of: fields with reasons, types that say what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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

from imdsproxy.config.change import Change
from imdsproxy.config.endpoint import Endpoint, parse_endpoint


def _absolute(path: Path) -> Path:
    if not path.is_absolute():
        raise PydanticCustomError("path", "{path} is not an absolute path", {"path": str(path)})
    return path


def _endpoint(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return parse_endpoint(value)
    except ValueError as error:
        raise PydanticCustomError("endpoint", "{why}", {"why": str(error)}) from None


def _off(value: object) -> object:
    # `off` without quotes is false in YAML 1.1, and nothing else can be meant where it is one of the words.
    return "off" if value is False else value


OffIsFalse = BeforeValidator(_off)
"""For words of which one is `off`."""

AbsolutePath = Annotated[Path, Strict(strict=False), AfterValidator(_absolute)]
HostEndpoint = Annotated[
    Endpoint,
    BeforeValidator(_endpoint),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"type": "string", "examples": ["127.0.0.1:9465", "[::1]:9465"]}),
]
AccountName = Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_-]{0,30}\$?$")]
Region = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
UnitName = Annotated[str, Field(pattern=r"^[A-Za-z0-9:_.@-]{1,200}\.service$")]


def setting(
    default: object,
    description: str,
    change: Change,
    *,
    ge: float | None = None,
    le: float | None = None,
    pattern: str | None = None,
    min_length: int | None = None,
    examples: list[Any] | None = None,
) -> Any:  # noqa: ANN401 - as pydantic's Field: it takes the type it stands beside
    """One documented field; the limits are pydantic's own, the first example goes into the sample."""
    return Field(
        default=default,
        description=description,
        json_schema_extra={"change": change.value},
        ge=ge,
        le=le,
        pattern=pattern,
        min_length=min_length,
        examples=examples,
    )


def section(description: str, model: type[Section]) -> Any:  # noqa: ANN401 - as above
    """A section inside another, with its own defaults."""
    return Field(default_factory=model, description=description)


class Section(BaseModel):
    """What all sections share: frozen, no unknown keys, no silent conversions."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False
    )


def cross(field: str, reason: str, hint: str) -> PydanticCustomError:
    """Two settings that do not go together, told at the one that `field` names."""
    return PydanticCustomError(
        "cross", "{reason}", {"field": field, "reason": reason, "hint": hint}
    )
