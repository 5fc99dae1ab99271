"""Settings out of Neutron's ini files: pure, from parsed options to a plan of what is to be written."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, TypeAlias

from pydantic import ValidationError

from imdsproxy.config.neutron_option import TRUE_WORDS, Fate, NeutronOption
from imdsproxy.config.neutron_options import NEUTRON_OPTIONS, NOVA
from imdsproxy.config.nova import DEFAULT_SET
from imdsproxy.config.nova_url import NovaUrl, parse_nova_url
from imdsproxy.config.schema import Settings
from imdsproxy.config.takes import render_value
from imdsproxy.config.words import explain_finding
from imdsproxy.core.neutron_ini import IniOption, expand_value, find_option
from imdsproxy.errors import ConfigInvalid, Problem

__all__ = ["Doubtful", "Given", "Imported", "Overridden", "Told", "plan_import"]

_SECTIONS_OF_NOVA: Final = frozenset({"neutron", "api", "api_database", "compute", "libvirt"})
"""Sections of nova.conf that no file of Neutron's has: both have `state_path`, `host`, `metadata_workers`."""

_BEFORE_THE_FRONT_S: Final = 2
"""Neutron's defaults differ as much: its proxies wait 32 s, and a guest is answered in 30."""

_RESPONSE_S: Final = (1, 600)
"""What `nova.response_timeout_s` takes."""

_NOTHING_TO_DO: Final[Mapping[str, bool]] = {
    "service_metadata_proxy": True,
    "local_metadata_per_cell": False,
}
"""Options of Nova's with the value at which nobody has to do anything."""

_SOUTHBOUND: Final = ("ovn", "ovn_sb_")
"""Section and first letters of the options that say where OVN's agent finds its database."""

_OVNS_FILE: Final = re.compile(r"(^|[._-])ovn([._-]|$)")
"""neutron_ovn_metadata_agent.ini, neutron_ovn_agent.ini, ovn_agent.ini."""

_LIKE: Final = 0.85
_OPTIONS: Final[Mapping[tuple[str, str], NeutronOption]] = {
    name: option for option in NEUTRON_OPTIONS for name in option.names
}
_SET: Final = f"nova.endpoint_sets.{DEFAULT_SET}"
_SECRET: Final = ("DEFAULT", "metadata_proxy_shared_secret")
_NOVAS_SECRET: Final = ("neutron", "metadata_proxy_shared_secret")

_Files: TypeAlias = "Sequence[Sequence[IniOption]]"


@dataclass(frozen=True, slots=True)
class Given:
    """What the operator says beside the files.

    Attributes:
        secret_file: Where the secret is to be.
        agent_user: The account that Neutron's agents run as, which no file says.
        server_name: The name in the certificate of a Nova that is given by address.
    """

    secret_file: Path
    agent_user: str = "neutron"
    server_name: str | None = None


@dataclass(frozen=True, slots=True)
class Told:
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
class Overridden:
    """A value that counts for nothing, since another one of the same option was read later."""

    written: IniOption
    by: IniOption


@dataclass(frozen=True, slots=True)
class Doubtful:
    """An option that is none, and looks like one: Neutron does not heed it either."""

    written: IniOption
    near: str


@dataclass(frozen=True, slots=True)
class Imported:
    """What is to be written, and what is to be said.

    Attributes:
        settings: Sections, as YAML has them.
        origins: For each setting in them (`unix_listener.path`) the options it comes from; none for a default.
        secret: What goes into the secret file.
        secret_from: Where it stands.
        secret_file: As it was given.
        host: Neutron's `host`, if there is one.
        ovn: What shows that the agent is OVN's, if it is: its database, or any option of a file of its name.
        others: How many options the files have that are of no concern.
    """

    settings: Mapping[str, Any]
    origins: Mapping[str, tuple[IniOption, ...]]
    secret: str
    secret_from: IniOption
    secret_file: Path
    host: str | None
    ovn: IniOption | None
    told: tuple[Told, ...]
    overridden: tuple[Overridden, ...]
    doubtful: tuple[Doubtful, ...]
    others: int


def plan_import(files: _Files, given: Given) -> Imported:
    """Translate what Neutron's files say.

    Args:
        files: What each file holds, in the order in which the agent was given them: later ones win. Nova's may be
            among them, and are told by their sections.
        given: What they cannot say.

    Raises:
        ConfigInvalid: Values that Neutron would not take, or imdsproxy does not; all at once, with file and line.
    """
    reading = _Reading(files)
    reading.check()
    url = _url(reading)
    secret = _secret(reading)
    settings, origins = _settings(reading, url, given)
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
        host=reading.value("DEFAULT", "host"),
        ovn=reading.ovn(),
        told=tuple(_told(reading)),
        overridden=tuple(reading.overridden()),
        doubtful=tuple(_doubtful(files)),
        others=len({(one.section, one.name) for one in _flat(files)} - _OPTIONS.keys()),
    )


@dataclass(slots=True)
class _Reading:
    """The files as their services read them, and what is wrong with them."""

    files: _Files
    problems: list[Problem] = field(default_factory=list)
    _values: dict[tuple[str, str], str | None] = field(default_factory=dict)

    def of(self, option: NeutronOption) -> _Files:
        """The files that the option's service reads."""
        return [one for one in self.files if _is_novas(one) == (option.whose == NOVA)]

    def written(self, section: str, name: str) -> IniOption | None:
        """Where the option in force stands, by its first name."""
        option = _OPTIONS[section, name]
        return find_option(self.of(option), option.names)

    def value(self, section: str, name: str) -> str | None:
        """The value in force; `None` where no file has it, or it is refused."""
        key = (section, name)
        if key not in self._values:
            self._values[key] = self._read(_OPTIONS[key])
        return self._values[key]

    def check(self) -> None:
        """Refuse every value that Neutron would refuse."""
        for option in NEUTRON_OPTIONS:
            self.value(*option.names[0])

    def ovn(self) -> IniOption | None:
        """What shows that these are files of OVN's agent."""
        ours = [one for file in self.files if not _is_novas(file) for one in file]
        named = (one for one in ours if _OVNS_FILE.search(Path(one.file).name))
        section, first = _SOUTHBOUND
        asks = (one for one in ours if one.section == section and one.name.startswith(first))
        return next(asks, None) or next(named, None)

    def refuse(self, written: IniOption, reason: str, hint: str = "") -> None:
        self.problems.append(Problem(_spelled(written), reason, hint, written.file, written.line))

    def overridden(self) -> Iterator[Overridden]:
        for option in NEUTRON_OPTIONS:
            chosen = self.written(*option.names[0])
            files = self.of(option)
            for one in _flat(files):
                same = (one.section, one.name) in option.names
                if chosen and same and _expanded(files, one) != _expanded(files, chosen):
                    yield Overridden(one, chosen)

    def _read(self, option: NeutronOption) -> str | None:
        written = self.written(*option.names[0])
        if written is None:
            return None
        files = self.of(option)
        try:
            value = _expand(files, written)
        except ValueError as error:
            # What is not taken over may refer to what the files of this host do not have.
            if option.fate is not Fate.NONE:
                self.refuse(written, str(error), "write the value itself")
            return None
        if not option.kind.accepts(value):
            shown = "its value" if option.secret else render_value(value)
            self.refuse(written, f"{shown} is not acceptable", f"Neutron takes {option.kind.words}")
            return None
        return value


def _url(reading: _Reading) -> NovaUrl | None:
    host = reading.value("DEFAULT", "nova_metadata_host")
    written = reading.written("DEFAULT", "nova_metadata_host")
    if written is not None and host is None:
        return None  # refused already
    scheme = reading.value("DEFAULT", "nova_metadata_protocol") or "http"
    port = reading.value("DEFAULT", "nova_metadata_port") or "8775"
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
    ours, novas = ((reading.value(*key), reading.written(*key)) for key in (_SECRET, _NOVAS_SECRET))
    found = next(((one, at) for one, at in (ours, novas) if one and at is not None), None)
    if found is None:
        at = ours[1] or novas[1]
        hint = "give Neutron and Nova the same one, a long one that nobody can guess"
        if at is not None:
            reading.refuse(at, "is empty: every guest could forge what it signs", hint)
        else:
            reason = "is in none of the files: nothing could be signed"
            reading.problems.append(Problem("[DEFAULT] metadata_proxy_shared_secret", reason, hint))
        return None
    if ours[0] and novas[0] and ours[0] != novas[0] and ours[1] and novas[1]:
        hint = "they have to be equal, or Nova answers 403"
        reading.refuse(ours[1], f"differs from the one in {novas[1].file}:{novas[1].line}", hint)
    if found[0] != found[0].strip():
        reading.refuse(found[1], "begins or ends with a blank, which a secret file cannot have")
    return found


def _settings(
    reading: _Reading, url: NovaUrl | None, given: Given
) -> tuple[dict[str, Any], dict[str, tuple[IniOption, ...]]]:
    """What the files come to, in the order of the schema, and where each setting comes from."""
    plan = _Plan(reading)
    endpoint = plan.list_of_one(f"{_SET}.endpoints")
    plan.put(
        f"{_SET}.endpoints[0].url",
        str(url),
        "nova_metadata_protocol",
        "nova_metadata_host",
        "nova_metadata_port",
        into=endpoint,
    )
    plan.put(f"{_SET}.secret_file", str(given.secret_file))
    plan.put_text(f"{_SET}.ca_file", "auth_ca_cert")
    if (reading.value("DEFAULT", "nova_metadata_insecure") or "").lower() in TRUE_WORDS:
        plan.put(f"{_SET}.verify", False, "nova_metadata_insecure")
    if given.server_name is not None:
        plan.put(f"{_SET}.server_name", given.server_name)
    if _has_client(reading):
        plan.put_text(f"{_SET}.client_cert_file", "nova_client_cert")
        plan.put_text(f"{_SET}.client_key_file", "nova_client_priv_key")
    wait = reading.value("metadata_haproxy", "timeout_server")
    if wait:
        low, high = _RESPONSE_S
        seconds = min(max(int(wait) - _BEFORE_THE_FRONT_S, low), high)
        plan.put("nova.response_timeout_s", seconds, "timeout_server", section="metadata_haproxy")
    plan.put("documents.enabled", False)
    plan.put("unix_listener.enabled", True)
    socket = reading.value("DEFAULT", "metadata_proxy_socket")
    state = reading.value("DEFAULT", "state_path") or "/var/lib/neutron"
    if socket is not None:
        plan.put("unix_listener.path", socket, "metadata_proxy_socket")
    else:
        plan.put("unix_listener.path", f"{state}/metadata_proxy", "state_path")
    if reading.ovn() is not None:
        plan.put("unix_listener.take_over", True)
    plan.put_text("unix_listener.mode", "metadata_proxy_socket_mode")
    plan.put("unix_listener.user", given.agent_user)
    plan.put("unix_listener.group", given.agent_user)
    plan.put_text("unix_listener.proxy_user", "metadata_proxy_user")
    plan.put_text("unix_listener.proxy_group", "metadata_proxy_group")
    return plan.settings, plan.origins


@dataclass(slots=True)
class _Plan:
    reading: _Reading
    settings: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, tuple[IniOption, ...]] = field(default_factory=dict)

    def put(
        self,
        path: str,
        value: object,
        *names: str,
        section: str = "DEFAULT",
        into: dict[str, Any] | None = None,
    ) -> None:
        """Set a setting, and remember which of the named options the files have."""
        *outer, last = path.split(".")
        inside = self._inside(outer) if into is None else into
        inside[last] = value
        found = (self.reading.written(section, name) for name in names)
        self.origins[path] = tuple(one for one in found if one is not None)

    def put_text(self, path: str, name: str) -> None:
        """Set a setting to an option's value, unless that is empty."""
        value = self.reading.value("DEFAULT", name)
        if value:
            self.put(path, value, name)

    def list_of_one(self, path: str) -> dict[str, Any]:
        *outer, last = path.split(".")
        item: dict[str, Any] = {}
        self._inside(outer)[last] = [item]
        return item

    def _inside(self, names: Sequence[str]) -> dict[str, Any]:
        inside = self.settings
        for name in names:
            inside = inside.setdefault(name, {})
        return inside


def _breaches(
    settings: Mapping[str, Any], origins: Mapping[str, tuple[IniOption, ...]]
) -> Iterator[Problem]:
    """What imdsproxy does not take of it, told where Neutron's file says it."""
    try:
        Settings.model_validate(settings)
    except ValidationError as error:
        for finding in map(explain_finding, error.errors()):
            found = origins.get(finding.field) or ()
            if finding.field == f"{_SET}.server_name" and not found:
                found = origins[f"{_SET}.endpoints[0].url"]
                finding = replace(finding, hint="give it with --server-name")  # noqa: PLW2901 - the same finding
            at = next((one for one in found if one.name.startswith("nova_metadata_")), None)
            at = at or next(iter(found), None)
            if at is None:
                yield Problem(finding.field, finding.reason, finding.hint)
            else:
                yield Problem(
                    _spelled(at),
                    f"{finding.field} {finding.reason}",
                    finding.hint,
                    at.file,
                    at.line,
                )


def _told(reading: _Reading) -> Iterator[Told]:
    for option in NEUTRON_OPTIONS:
        written = reading.written(*option.names[0])
        if written is None:
            continue
        fate, why = option.fate, option.why
        if option.name in {"nova_client_cert", "nova_client_priv_key"} and option.becomes:
            if not _has_client(reading):
                fate, why = Fate.NONE, "Neutron uses neither of the two where one is empty."
        elif written.name != option.name:
            why = f"Of old, for `{option.name}`. {why}"
        elif option.name in _NOTHING_TO_DO:
            is_true = (reading.value(*option.names[0]) or "").lower() in TRUE_WORDS
            fate = Fate.NONE if is_true is _NOTHING_TO_DO[option.name] else fate
        yield Told(option, written, fate, why)


def _has_client(reading: _Reading) -> bool:
    return all(
        reading.value("DEFAULT", name) for name in ("nova_client_cert", "nova_client_priv_key")
    )


def _doubtful(files: _Files) -> Iterator[Doubtful]:
    known = [name for section, name in _OPTIONS if section == "DEFAULT"]
    for one in _flat(files):
        name = one.name.replace("-", "_")
        if (one.section, one.name) in _OPTIONS or not name.startswith(("metadata_", "nova_")):
            continue
        near = difflib.get_close_matches(name, known, n=1, cutoff=_LIKE)
        if near and one.section == "DEFAULT":
            yield Doubtful(one, near[0])


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
    names = [*named, (written.section, name), ("DEFAULT", name)]
    for one in names:
        option = _OPTIONS.get(one)
        found = find_option(files, [one] if option is None else option.names)
        if found is not None:
            return found.value
        if option is not None and option.default.startswith(("/", "$")):
            return option.default
    return None


def _is_novas(options: Sequence[IniOption]) -> bool:
    return any(one.section in _SECTIONS_OF_NOVA for one in options)


def _flat(files: _Files) -> Iterator[IniOption]:
    for options in files:
        yield from options


def _spelled(written: IniOption) -> str:
    return f"[{written.section}] {written.name}"
