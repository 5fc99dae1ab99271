"""Reader of this host's secrets, so that the redactor can find them in other files."""

import base64
import contextlib
import json
import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from imdsproxy.config.schema import Settings
from imdsproxy.documents.compiled import parse_compiled
from imdsproxy.errors import RecordCorrupt
from imdsproxy.haproxy.layout import Layout
from imdsproxy.sources.file.record_file import SUFFIXES

_SECRET_FILE: Final = re.compile(r"(secret|key|password)_file$")
_TOKEN_KEY: Final = re.compile(rb"[A-Za-z0-9+/]{43}=")
"""Pattern of a token key. A fleet's token keys are in no file that the settings name."""
_SECRET_KEY: Final = re.compile(r"pass|secret|token|key|credential", re.IGNORECASE)
_DATA_FIELDS: Final = ("user_data", "vendor_data", "ssh_keys", "user_data_base64")


@dataclass(slots=True)
class Known:
    """Secrets that a bundle must not contain.

    Attributes:
        data: User-data, vendor-data, keys and similar texts, in which each line is a secret.
        names: Ids, names and host names of instances, which are not secrets, even if user-data contains them.
        unread: Unreadable files, each with the reason. Their secrets are not known.
    """

    secrets: list[bytes] = field(default_factory=list)
    data: list[bytes] = field(default_factory=list)
    names: set[bytes] = field(default_factory=set)
    unread: list[str] = field(default_factory=list)


def read_known(settings: Settings, layout: Layout) -> Known:
    """Read all secrets from files that the settings name and from imdsproxy's own files."""
    known = Known()
    files = [*_secret_files(settings.model_dump()), layout.token_keys]
    for path in dict.fromkeys(files):
        _read(known, path, lambda content: known.secrets.extend([content, *content.splitlines()]))
    _read(known, layout.token_keys_map, lambda one: known.secrets.extend(_TOKEN_KEY.findall(one)))
    clouds = settings.sources.neutron.clouds_path
    for path in (clouds, clouds.with_name("secure.yaml")):
        _read(known, path, lambda content: known.secrets.extend(_cloud_secrets(content)))
    for path in _below(known, layout.passwords, "*"):
        _read(known, path, known.data.append)
    for path in _below(known, layout.records, "*/*.rec"):
        _read(known, path, lambda content: _take_compiled(known, content))
    _read_store(known, settings.store_path, "instances")
    _read_store(known, layout.state / "last-good.sqlite", "last_good")
    directory = settings.sources.file.directory
    for path in _below(known, directory, "**/*"):
        read = _record_file_data if path.suffix in SUFFIXES else _whole
        _read(known, path, lambda content, read=read: known.data.extend(read(content)))  # type: ignore[misc]
    return known


def _read(known: Known, path: Path, take: Callable[[bytes], object]) -> None:
    try:
        if path.is_file():
            take(path.read_bytes())
    except OSError as error:
        known.unread.append(f"{path}: {error}")


def _below(known: Known, directory: Path, pattern: str) -> list[Path]:
    try:
        return sorted(directory.glob(pattern))
    except OSError as error:
        known.unread.append(f"{directory}: {error}")
        return []


def _secret_files(section: dict[str, Any]) -> Iterator[Path]:
    """Yield the files of settings whose names end with `secret_file`, `key_file` or `password_file`, in any section."""
    for name, value in section.items():
        if isinstance(value, dict):
            yield from _secret_files(value)
        elif _SECRET_FILE.search(str(name)) and isinstance(value, Path):
            yield value


def _cloud_secrets(content: bytes) -> Iterator[bytes]:
    """Yield the values of keys whose names suggest a secret; every line if the file is not YAML."""
    try:
        found = yaml.safe_load(content)
    except yaml.YAMLError:
        yield from content.splitlines()
        return
    yield from _named(found)


def _named(value: object, *, secret: bool = False) -> Iterator[bytes]:
    match value:
        case dict():
            for name, inner in value.items():
                yield from _named(inner, secret=secret or bool(_SECRET_KEY.search(str(name))))
        case list():
            for inner in value:
                yield from _named(inner, secret=secret)
        case _ if secret:
            yield str(value).encode()
        case _:
            pass


def _take_compiled(known: Known, content: bytes) -> None:
    try:
        record = parse_compiled(content)
    except RecordCorrupt:
        known.data.append(content)
        return
    known.names.update(record[name].encode() for name in ("id", "name", "hostname"))
    known.data.extend(key.encode() for _, key in record["ssh_keys"])
    known.data.append(record["vendor_data"] or b"")
    if (blob := record["user_data"]) is not None:
        known.data.append(content[blob.offset : blob.offset + blob.length])


def _read_store(known: Known, path: Path, table: str) -> None:
    if not path.exists():
        return
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5)) as store:
            for record, user_data in store.execute(f"SELECT record, user_data FROM {table}"):  # noqa: S608 - ours
                known.data.extend((user_data or b"", *_record_data(json.loads(record))))
    except (sqlite3.Error, ValueError) as error:
        known.unread.append(f"{path}: {error}")


def _whole(content: bytes) -> Iterator[bytes]:
    """Yield a whole file: other files in the record directory are payloads that records name."""
    yield content


def _record_file_data(content: bytes) -> Iterator[bytes]:
    """Yield the payloads of all records in a file; the whole file if it is not YAML."""
    try:
        documents = list(yaml.safe_load_all(content))
    except yaml.YAMLError:
        yield content
        return
    for one in documents:
        yield from _record_data(one)


def _record_data(value: object) -> Iterator[bytes]:
    match value:
        case dict():
            for name, inner in value.items():
                if name in _DATA_FIELDS:
                    yield from _texts(inner)
                else:
                    yield from _record_data(inner)
        case list():
            for inner in value:
                yield from _record_data(inner)
        case _:
            pass


def _texts(value: object) -> Iterator[bytes]:
    match value:
        case dict():
            yield json.dumps(value).encode()
            with contextlib.suppress(TypeError, ValueError):
                # Records encode bytes that are not UTF-8 this way.
                yield base64.b64decode(value.get("base64", ""))
            for inner in value.values():
                yield from _texts(inner)
        case list():
            for inner in value:
                yield from _texts(inner)
        case bytes():
            yield value
        case str():
            yield value.encode()
        case _:
            yield str(value).encode()
