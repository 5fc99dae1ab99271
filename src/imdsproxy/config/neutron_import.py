"""Settings out of Neutron's ini files: pure, from parsed options to the text of a settings file."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

from pydantic import ValidationError

from imdsproxy.config.describe import explain_finding
from imdsproxy.config.neutron_options import (
    NEUTRON_OPTIONS,
    NOVA,
    TRUE_WORDS,
    Fate,
    NeutronOption,
)
from imdsproxy.config.schema import Settings
from imdsproxy.config.strict_yaml import render_value
from imdsproxy.core.neutron_ini import IniOption, expand_value, find_option
from imdsproxy.errors import ConfigInvalid, Problem
from imdsproxy.nova.settings import DEFAULT_SET, NovaUrl, parse_nova_url

_SECTIONS_OF_NOVA: Final = frozenset({"neutron", "api", "api_database", "compute", "libvirt"})
"""Sections of nova.conf that no file of Neutron's has: both have `state_path`, `host`, `metadata_workers`."""

_BEFORE_THE_FRONT_S: Final = 2
"""Neutron's defaults differ as much: its proxies wait 32 s, and a guest is answered in 30."""

_RESPONSE_S: Final = (1, 600)
"""What `nova.response_timeout_s` takes."""

_RIGHT_IN_NOVA: Final[Mapping[str, bool]] = {
    "service_metadata_proxy": True,
    "local_metadata_per_cell": False,
}
"""Options of Nova's with the value that needs no change by hand."""

_OVNS_FILE: Final = re.compile(r"(^|[._-])ovn([._-]|$)")
"""neutron_ovn_metadata_agent.ini, neutron_ovn_agent.ini, ovn_agent.ini."""

_LIKE: Final = 0.85
_OPTIONS: Final[Mapping[tuple[str, str], NeutronOption]] = {
    name: option for option in NEUTRON_OPTIONS for name in option.names
}
_SET: Final = f"nova.endpoint_sets.{DEFAULT_SET}"
_URL: Final = f"{_SET}.endpoints[0].url"
_URL_OPTIONS: Final = ("nova_metadata_protocol", "nova_metadata_host", "nova_metadata_port")
_CLIENT: Final = ("nova_client_cert", "nova_client_priv_key")

_COLUMN: Final = 56
_HEAD: Final = "# Made by `imdsproxy config import`. What is not here has its default: see `imdsproxy config sample`."
_WITHOUT_OPTION: Final[Mapping[str, str]] = {
    f"{_SET}.secret_file": "its value is Neutron's metadata_proxy_shared_secret",
    f"{_SET}.server_name": "as given",
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

_Files: TypeAlias = "Sequence[Sequence[IniOption]]"


@dataclass(frozen=True, slots=True)
class Given:
    """What the operator gives beside the files.

    Attributes:
        secret_file: Where the secret is to be.
        agent_user: The account that Neutron's agents run as, which no file says.
        server_name: The name in the certificate of a Nova that is given by address.
    """

    secret_file: Path
    agent_user: str = "neutron"
    server_name: str | None = None


class Reported(NamedTuple):
    """What became of one option that the files have."""

    option: NeutronOption
    written: IniOption
    fate: Fate
    why: str

    @property
    def becomes(self) -> str:
        """The setting, if it becomes one; otherwise empty."""
        return "" if self.fate is Fate.NONE else self.option.becomes


@dataclass(frozen=True, slots=True)
class Imported:
    """What is to be written, and what is to be reported.

    Attributes:
        settings: Values by path, as `unix_listener.path`, in the schema's order.
        origins: For each of them the options it comes from; none for a default.
        secret: What goes into the secret file.
        secret_from: Where it stands.
        secret_file: As it was given.
        host: Neutron's `host`, if there is one.
        ovn: What shows that the agent is OVN's, if it is: its database, or any option of a file of its name.
        overridden: Values without effect, each with the one of the same option that was read later.
        doubtful: Unknown options, which Neutron ignores too, each with the known name that is like theirs.
        others: How many options the files have that are of no concern.
    """

    settings: Mapping[str, object]
    origins: Mapping[str, tuple[IniOption, ...]]
    secret: str
    secret_from: IniOption
    secret_file: Path
    host: str | None
    ovn: IniOption | None
    reported: tuple[Reported, ...]
    overridden: tuple[tuple[IniOption, IniOption], ...]
    doubtful: tuple[tuple[IniOption, str], ...]
    others: int

    @property
    def nested(self) -> dict[str, Any]:
        """The settings as sections, as YAML has them."""
        return _nested(self.settings)


def plan_import(files: _Files, given: Given) -> Imported:
    """Translate what Neutron's files say.

    Args:
        files: What each file holds, in the order in which the agent was given them: later ones win. Nova's may be
            among them, and are recognised by their sections.
        given: What they cannot say.

    Raises:
        ConfigInvalid: Values that Neutron would not take, or imdsproxy does not; all at once, with file and line.
    """
    reading = _Reading(files)
    url = _url(reading)
    secret = _secret(reading)
    rows = _settings(reading, url, given)
    settings = {path: value for path, value, _ in rows}
    origins = {path: reading.all_written(names) for path, _, names in rows}
    if not reading.problems:
        reading.problems += _breaches(settings, origins)
    if reading.problems or secret is None:
        count = len(reading.problems)
        raise ConfigInvalid(
            f"Neutron's files have {count} problem{'s' if count != 1 else ''}",
            problems=reading.problems,
        )
    return Imported(
        settings=settings,
        origins=origins,
        secret=secret[0],
        secret_from=secret[1],
        secret_file=given.secret_file,
        host=reading.value("host"),
        ovn=reading.ovn,
        reported=tuple(_report(reading)),
        overridden=tuple(_overridden(reading)),
        doubtful=tuple(_doubtful(reading)),
        others=len({(one.section, one.name) for one in reading.each} - _OPTIONS.keys()),
    )


def render_imported(imported: Imported) -> str:
    """The settings file; it loads as it is, and with the first # off its last lines too."""
    lines = [_HEAD]
    before: list[str] = []
    for path, value in imported.settings.items():
        steps = path.split(".")
        for depth, step in enumerate(steps[:-1]):
            if steps[: depth + 1] != before[: depth + 1]:
                blank = [] if depth else [""]
                lines += [*blank, f"{'  ' * depth}{step.removesuffix('[0]')}:"]
        before = steps
        dash = "- " if len(steps) > 1 and steps[-2].endswith("[0]") else ""
        line = f"{'  ' * (len(steps) - 1)}{dash}{steps[-1]}: {render_value(value)}"
        lines.append(f"{line.ljust(_COLUMN)} # {_origin(path, imported.origins[path])}")
    host = f"#    # list_host: {render_value(imported.host)}\n" if imported.host else ""
    return "\n".join([*lines, "", _BY_HAND + host])


def _origin(path: str, options: Sequence[IniOption]) -> str:
    if not options:
        return _WITHOUT_OPTION.get(path, "Neutron's default")
    places = ", ".join(f"{one.file}:{one.line}" for one in options)
    # A file's name may hold anything, also the end of a line.
    return "".join(letter if letter.isprintable() else "?" for letter in places)


def _nested(settings: Mapping[str, object]) -> dict[str, Any]:
    root: dict[str, Any] = {}
    for path, value in settings.items():
        *outer, last = path.split(".")
        inside = root
        for step in outer:
            name, item, _ = step.partition("[")
            held = inside.setdefault(name, [{}] if item else {})
            inside = held[0] if item else held
        inside[last] = value
    return root


class _Reading:
    """The files as their services read them, and what is wrong with them."""

    def __init__(self, files: _Files) -> None:
        self._files = files
        self.problems: list[Problem] = []
        self._written = {
            option: find_option(self.of(option), option.names) for option in NEUTRON_OPTIONS
        }
        self._values = {
            option: None if at is None else self._read(option, at)
            for option, at in self._written.items()
        }

    @property
    def each(self) -> Iterator[IniOption]:
        """Every option of every file."""
        return (one for file in self._files for one in file)

    def of(self, option: NeutronOption) -> _Files:
        """The files that the option's service reads."""
        return [one for one in self._files if _is_novas(one) == (option.whose == NOVA)]

    def written(self, name: str, section: str = "DEFAULT") -> IniOption | None:
        """Where the option in force stands, by its first name."""
        return self._written[_OPTIONS[section, name]]

    def value(self, name: str, section: str = "DEFAULT") -> str | None:
        """The value in force; `None` where no file has it, or it is refused."""
        return self._values[_OPTIONS[section, name]]

    def is_true(self, name: str, section: str = "DEFAULT") -> bool:
        return (self.value(name, section) or "").lower() in TRUE_WORDS

    def all_written(self, names: Sequence[str]) -> tuple[IniOption, ...]:
        """Where those of the named options stand that the files have."""
        section = "metadata_haproxy" if names == ("timeout_server",) else "DEFAULT"
        found = (self.written(name, section) for name in names)
        return tuple(one for one in found if one is not None)

    @property
    def has_client(self) -> bool:
        """Whether Neutron identifies itself to Nova with a certificate."""
        return all(map(self.value, _CLIENT))

    @property
    def ovn(self) -> IniOption | None:
        """What shows that these are files of OVN's agent."""
        ours = [one for file in self._files if not _is_novas(file) for one in file]
        named = (one for one in ours if _OVNS_FILE.search(Path(one.file).name))
        asks = (one for one in ours if one.section == "ovn" and one.name.startswith("ovn_sb_"))
        return next(asks, None) or next(named, None)

    def refuse(self, written: IniOption, reason: str, hint: str = "") -> None:
        self.problems.append(Problem(_spelled(written), reason, hint, written.file, written.line))

    def _read(self, option: NeutronOption, written: IniOption) -> str | None:
        try:
            value = _expand(self.of(option), written)
        except ValueError as error:
            # What is not taken over may refer to what the files of this host do not have.
            if option.fate is not Fate.NONE:
                self.refuse(written, str(error), "write the value itself")
            return None
        if not option.accepts(value):
            shown = "its value" if option.secret else render_value(value)
            self.refuse(written, f"{shown} is not acceptable", f"Neutron takes {option.takes}")
            return None
        return value


def _url(reading: _Reading) -> NovaUrl | None:
    host = reading.value("nova_metadata_host")
    written = reading.written("nova_metadata_host")
    if written is not None and host is None:
        return None  # refused already
    scheme = reading.value("nova_metadata_protocol") or "http"
    port = reading.value("nova_metadata_port") or "8775"
    name = "127.0.0.1" if host is None else host
    # Neutron puts brackets around IPv6 addresses itself; before it did, operators wrote them.
    bracketed = f"[{name}]" if ":" in name and not name.startswith("[") else name
    try:
        return parse_nova_url(f"{scheme}://{bracketed}:{int(port)}")
    except ValueError as error:
        if written is not None:
            reading.refuse(written, str(error), "takes a name or an address")
        return None


def _secret(reading: _Reading) -> tuple[str, IniOption] | None:
    name = "metadata_proxy_shared_secret"
    ours, novas = (
        (reading.value(name, section), reading.written(name, section))
        for section in ("DEFAULT", "neutron")
    )
    found = next(((one, at) for one, at in (ours, novas) if one and at is not None), None)
    if found is None:
        at = ours[1] or novas[1]
        hint = "give Neutron and Nova the same long, random one"
        if at is not None:
            reading.refuse(at, "is empty: every guest could forge what it signs", hint)
        else:
            reason = "is in none of the files: nothing could be signed"
            reading.problems.append(Problem(f"[DEFAULT] {name}", reason, hint))
        return None
    if ours[0] and novas[0] and ours[0] != novas[0] and ours[1] and novas[1]:
        hint = "they have to be equal, or Nova answers 403"
        reading.refuse(ours[1], f"differs from the one in {novas[1].file}:{novas[1].line}", hint)
    if found[0] != found[0].strip():
        reading.refuse(found[1], "begins or ends with a blank, which a secret file cannot have")
    return found


def _settings(
    reading: _Reading, url: NovaUrl | None, given: Given
) -> list[tuple[str, object, tuple[str, ...]]]:
    """What the files come to, in the order of the schema: path, value, and the options it comes from."""

    def same(path: str, name: str, *, when: bool = True) -> tuple[str, object, tuple[str, ...]]:
        return path, (reading.value(name) or None) if when else None, (name,)

    seconds: int | None = None
    if wait := reading.value("timeout_server", "metadata_haproxy"):
        low, high = _RESPONSE_S
        seconds = min(max(int(wait) - _BEFORE_THE_FRONT_S, low), high)
    socket = reading.value("metadata_proxy_socket")
    state = reading.value("state_path") or "/var/lib/neutron"
    insecure = reading.is_true("nova_metadata_insecure")
    rows: list[tuple[str, object, tuple[str, ...]]] = [
        (_URL, str(url), _URL_OPTIONS),
        (f"{_SET}.secret_file", str(given.secret_file), ()),
        same(f"{_SET}.ca_file", "auth_ca_cert"),
        (f"{_SET}.verify", False if insecure else None, ("nova_metadata_insecure",)),
        (f"{_SET}.server_name", given.server_name, ()),
        same(f"{_SET}.client_cert_file", "nova_client_cert", when=reading.has_client),
        same(f"{_SET}.client_key_file", "nova_client_priv_key", when=reading.has_client),
        ("nova.response_timeout_s", seconds, ("timeout_server",)),
        ("documents.enabled", False, ()),
        ("unix_listener.enabled", True, ()),
        ("unix_listener.path", f"{state}/metadata_proxy", ("state_path",))
        if socket is None
        else ("unix_listener.path", socket, ("metadata_proxy_socket",)),
        ("unix_listener.take_over", True if reading.ovn else None, ()),
        same("unix_listener.mode", "metadata_proxy_socket_mode"),
        ("unix_listener.user", given.agent_user, ()),
        ("unix_listener.group", given.agent_user, ()),
        same("unix_listener.proxy_user", "metadata_proxy_user"),
        same("unix_listener.proxy_group", "metadata_proxy_group"),
    ]
    return [row for row in rows if row[1] is not None]


def _breaches(
    settings: Mapping[str, object], origins: Mapping[str, tuple[IniOption, ...]]
) -> Iterator[Problem]:
    """What imdsproxy does not take of it, reported where Neutron's file says it."""
    try:
        Settings.model_validate(_nested(settings))
    except ValidationError as error:
        for finding in map(explain_finding, error.errors()):
            found = origins.get(finding.field) or ()
            if finding.field == f"{_SET}.server_name" and not found:
                found = origins[_URL]
                finding = replace(finding, hint="give it with --server-name")  # noqa: PLW2901 - the same finding
            at = next((one for one in found if one.name.startswith("nova_metadata_")), None)
            at = at or next(iter(found), None)
            if at is None:
                yield Problem(finding.field, finding.reason, finding.hint)
            else:
                reason = f"{finding.field} {finding.reason}"
                yield Problem(_spelled(at), reason, finding.hint, at.file, at.line)


def _report(reading: _Reading) -> Iterator[Reported]:
    for option in NEUTRON_OPTIONS:
        section, name = option.names[0]
        written = reading.written(name, section)
        if written is None:
            continue
        fate, why = option.fate, option.why
        if name in _CLIENT and option.becomes:
            if not reading.has_client:
                fate, why = Fate.NONE, "Neutron uses neither of the two where one is empty."
        elif written.name != name:
            why = f"Of old, for `{name}`. {why}"
        elif name in _RIGHT_IN_NOVA and reading.is_true(name, section) is _RIGHT_IN_NOVA[name]:
            fate = Fate.NONE
        yield Reported(option, written, fate, why)


def _overridden(reading: _Reading) -> Iterator[tuple[IniOption, IniOption]]:
    for option in NEUTRON_OPTIONS:
        chosen = find_option(files := reading.of(option), option.names)
        for one in (one for file in files for one in file):
            same = (one.section, one.name) in option.names
            if chosen and same and _expanded(files, one) != _expanded(files, chosen):
                yield one, chosen


def _doubtful(reading: _Reading) -> Iterator[tuple[IniOption, str]]:
    known = [name for section, name in _OPTIONS if section == "DEFAULT"]
    for one in reading.each:
        name = one.name.replace("-", "_")
        if (one.section, one.name) in _OPTIONS or not name.startswith(("metadata_", "nova_")):
            continue
        near = difflib.get_close_matches(name, known, n=1, cutoff=_LIKE)
        if near and one.section == "DEFAULT":
            yield one, near[0]


def _expand(files: _Files, written: IniOption) -> str:
    return expand_value(written.value, lambda name: _look_up(files, written, name))


def _expanded(files: _Files, written: IniOption) -> str:
    """The value, as it is written where it refers to what is not there."""
    try:
        return _expand(files, written)
    except ValueError:
        return written.value


def _look_up(files: _Files, written: IniOption, name: str) -> str | None:
    """What `$name` stands for in a value, as it is written or Neutron's default."""
    group, dot, last = name.partition(".")
    named = [(group.lower(), last)] if dot else []
    for one in [*named, (written.section, name), ("DEFAULT", name)]:
        option = _OPTIONS.get(one)
        found = find_option(files, [one] if option is None else option.names)
        if found is not None:
            return found.value
        if option is not None and option.default.startswith(("/", "$")):
            return option.default
    return None


def _is_novas(options: Sequence[IniOption]) -> bool:
    return any(one.section in _SECTIONS_OF_NOVA for one in options)


def _spelled(written: IniOption) -> str:
    return f"[{written.section}] {written.name}"
