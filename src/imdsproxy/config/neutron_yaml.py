"""The imported settings as a YAML file: each with where it comes from, and what has to be added as comments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from imdsproxy.config.shape import join_place
from imdsproxy.config.takes import render_value

if TYPE_CHECKING:
    from imdsproxy.config.neutron_import import Imported
    from imdsproxy.core.neutron_ini import IniOption

__all__ = ["render_imported"]

_COLUMN: Final = 56
_HEAD: Final = "# Made by `imdsproxy config import`. What is not here has its default: see `imdsproxy config sample`."
_WITHOUT_OPTION: Final[Mapping[str, str]] = {
    "nova.endpoint_sets.default.secret_file": "its value is Neutron's metadata_proxy_shared_secret",
    "nova.endpoint_sets.default.server_name": "as given",
    "documents.enabled": "all documents are Nova's",
    "unix_listener.enabled": "in the place of neutron-metadata-agent",
    "unix_listener.take_over": "OVN's agent listens there and has to run on",
    "unix_listener.user": "whom Neutron's agents run as; no file says it",
    "unix_listener.group": "its group",
}
_BY_HAND: Final = """\
# To be added: Neutron's agents asked by RPC, imdsproxy asks Neutron's API, and no file says where that is. Take the
# first # off these lines and name a cloud of /etc/openstack/clouds.yaml, or the URL of a Neutron without Keystone.
#sources:
#  neutron:
#    enabled: true
#    cloud: CLOUD
#    # endpoint: http://127.0.0.1:9696
"""


def render_imported(imported: Imported) -> str:
    """The file; it loads as it is, and with the first # off its last lines too."""
    lines = [_HEAD]
    for name, section in imported.settings.items():
        lines += ["", f"{name}:", *_lines(section, (name,), imported.origins)]
    stanza = _BY_HAND
    if imported.host:
        stanza += f"#    # list_host: {render_value(imported.host)}\n"
    return "\n".join([*lines, "", stanza])


def _lines(
    values: Mapping[str, Any],
    place: tuple[str | int, ...],
    origins: Mapping[str, tuple[IniOption, ...]],
) -> Iterator[str]:
    for name, value in values.items():
        here = (*place, name)
        indent = "  " * len(place)
        if isinstance(value, Mapping):
            yield f"{indent}{render_value(name)}:"
            yield from _lines(value, here, origins)
        elif isinstance(value, list):
            yield f"{indent}{name}:"
            for index, item in enumerate(value):
                first, *rest = _lines(item, (*here, index), origins)
                at = len(first) - len(first.lstrip())
                yield f"{first[: at - 2]}- {first[at:]}"
                yield from rest
        else:
            path = join_place(here)
            line = f"{indent}{name}: {render_value(value)}"
            yield f"{line.ljust(_COLUMN)} # {_origin(path, origins.get(path, ()))}"


def _origin(path: str, options: Sequence[IniOption]) -> str:
    if not options:
        return _WITHOUT_OPTION.get(path, "Neutron's default")
    places = ", ".join(f"{one.file}:{one.line}" for one in options)
    # A file's name may hold anything, also the end of a line.
    return "".join(letter if letter.isprintable() else "?" for letter in places)
