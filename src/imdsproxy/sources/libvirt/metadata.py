"""The element that a domain's `<metadata>` carries for us, as keys of an instance's record.

    <imds:instance xmlns:imds="urn:imdsproxy:libvirt:1" id="ID">      id: the domain's UUID without it
      <imds:hostname>NAME</imds:hostname>                             made of the domain's name without it
      <imds:ssh-key name="NAME">ssh-ed25519 AAAA…</imds:ssh-key>      as many as there are; name is optional
      <imds:user-data encoding="base64">…</imds:user-data>            without encoding: text
      <imds:vendor-data>…</imds:vendor-data>                          the same
      <imds:tag name="NAME">VALUE</imds:tag>                          as many as there are
      <imds:project>, <imds:availability-zone>, <imds:instance-type>
      <imds:dialect name="ec2" serve="no"/>
    </imds:instance>

There is no element that names a file: who may define a domain could have root read any file to a guest.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Final, TypeAlias
from xml.etree.ElementTree import Element

from imdsproxy.core.records import Json
from imdsproxy.errors import Problem

METADATA_URI: Final = "urn:imdsproxy:libvirt:1"
"""The element's namespace. A URN: no one else can own it, and there is nothing to fetch."""

_Record: TypeAlias = "dict[str, Json]"

_TEXTS: Final = {
    "hostname": "hostname",
    "project": "project",
    "availability-zone": "availability_zone",
    "instance-type": "instance_type",
}
_SWITCHES: Final = {"yes": True, "no": False}
_BLANKS: Final = " \t\r\n"


def read_metadata(element: Element, place: str) -> tuple[_Record, tuple[Problem, ...]]:
    """The keys of an instance's record that the element gives, and what in it is not understood.

    Args:
        element: `{urn:imdsproxy:libvirt:1}instance`.
        place: Where it is, for the problems: `domain web-1`.
    """
    reader = _Reader(place)
    reader.attributes(element, "", ("id",))
    record: _Record = {}
    identity = element.get("id")
    if identity is not None:
        record["id"] = identity
    if element.text is not None and element.text.strip(_BLANKS):
        reader.refuse("", "holds text outside its elements", "put it into <imds:user-data>")
    for child in element:
        name = _local_name(child)
        read = _ELEMENTS.get(name or "")
        if read is None:
            reader.refuse(name or child.tag, "unknown element", _nearest(name or child.tag))
        else:
            read(reader, record, child)
    return record, tuple(reader.problems)


class _Reader:
    def __init__(self, place: str) -> None:
        self._place = place
        self.problems: list[Problem] = []

    def refuse(self, name: str, reason: str, hint: str = "") -> None:
        field = f"instance.{name}" if name else "instance"
        self.problems.append(Problem(field, reason, hint, self._place))

    def attributes(self, element: Element, name: str, known: tuple[str, ...]) -> None:
        for key in element.attrib:
            if key not in known:
                hint = f"known: {', '.join(known)}" if known else "it has none"
                self.refuse(name, f"unknown attribute {key}", hint)

    def text(self, record: _Record, element: Element) -> None:
        name = _local_name(element) or ""
        self.attributes(element, name, ())
        if _TEXTS[name] in record:
            self.refuse(name, "is there twice")
        record[_TEXTS[name]] = (element.text or "").strip(_BLANKS)

    def ssh_key(self, record: _Record, element: Element) -> None:
        self.attributes(element, "ssh-key", ("name",))
        keys = record.setdefault("ssh_keys", [])
        key, name = (element.text or "").strip(_BLANKS), element.get("name")
        if isinstance(keys, list):
            keys.append(key if name is None else {"name": name, "key": key})

    def tag(self, record: _Record, element: Element) -> None:
        self.attributes(element, "tag", ("name",))
        tags, name = record.setdefault("tags", {}), element.get("name")
        if name is None:
            self.refuse("tag", "has no name", '<imds:tag name="role">web</imds:tag>')
        elif isinstance(tags, dict):
            if name in tags:
                self.refuse("tag", f"{name} is there twice")
            tags[name] = element.text or ""

    def dialect(self, record: _Record, element: Element) -> None:
        self.attributes(element, "dialect", ("name", "serve"))
        dialects, name = record.setdefault("dialects", {}), element.get("name")
        serve = _SWITCHES.get(element.get("serve", ""))
        if name is None or serve is None:
            self.refuse("dialect", "is not understood", '<imds:dialect name="ec2" serve="no"/>')
        elif isinstance(dialects, dict):
            dialects[name] = serve

    def payload(self, record: _Record, element: Element) -> None:
        name = _local_name(element) or ""
        self.attributes(element, name, ("encoding",))
        key = name.replace("-", "_")
        if key in record:
            self.refuse(name, "is there twice")
        text, encoding = element.text or "", element.get("encoding")
        if encoding is None:
            record[key] = _without_first_break(text)
        elif encoding == "base64" and key == "user_data":
            record[key] = {"base64": "".join(text.split())}
        else:
            self.refuse(name, f"unknown encoding {encoding}", "base64 (user-data), or none: text")


_ELEMENTS: Final[Mapping[str, Callable[[_Reader, _Record, Element], None]]] = {
    **dict.fromkeys(_TEXTS, _Reader.text),
    "ssh-key": _Reader.ssh_key,
    "tag": _Reader.tag,
    "dialect": _Reader.dialect,
    "user-data": _Reader.payload,
    "vendor-data": _Reader.payload,
}


def _without_first_break(text: str) -> str:
    """The text without the line end that follows the opening tag: `#cloud-config` must be first."""
    first, end, rest = text.partition("\n")
    return rest if end and not first.strip(_BLANKS) else text


def _local_name(element: Element) -> str | None:
    prefix = f"{{{METADATA_URI}}}"
    return element.tag.removeprefix(prefix) if element.tag.startswith(prefix) else None


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name, _ELEMENTS, n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(_ELEMENTS))}"
