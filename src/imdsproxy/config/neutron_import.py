"""Settings from Neutron's ini files. Pure: from parsed options to the text of a settings file and a report."""

import difflib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

from pydantic import ValidationError

from imdsproxy.config.describe import explain_finding, render_nodes, walk_values
from imdsproxy.config.neutron_ini import IniOption, expand_value, find_option
from imdsproxy.config.neutron_options import NEUTRON_OPTIONS, NOVA, TRUE_WORDS, Fate, NeutronOption
from imdsproxy.config.nova import DEFAULT_SET, parse_nova_url
from imdsproxy.config.schema import Settings
from imdsproxy.config.strict_yaml import render_value
from imdsproxy.errors import ConfigInvalid, Problem

_SECTIONS_OF_NOVA: Final = frozenset({"neutron", "api", "api_database", "compute", "libvirt"})
"""Sections that only nova.conf has; Nova's and Neutron's files both have `state_path`, `host`, `metadata_workers`."""

_BEFORE_THE_FRONT_S: Final = 2
"""Difference of Neutron's own defaults: its proxies wait 32 s, and a guest is answered in 30."""

_RESPONSE_S: Final = (1, 600)
"""Bounds of `nova.response_timeout_s`."""

_OVNS_FILE: Final = re.compile(r"(^|[._-])ovn([._-]|$)")
"""Matches neutron_ovn_metadata_agent.ini, neutron_ovn_agent.ini, ovn_agent.ini."""

_LIKE: Final = 0.85
_OPTIONS: Final[Mapping[tuple[str, str], NeutronOption]] = {
    name: option for option in NEUTRON_OPTIONS for name in option.names
}
_SET: Final = f"nova.endpoint_sets.{DEFAULT_SET}"
_CLIENT: Final = ("nova_client_cert", "nova_client_priv_key")

_COLUMN: Final = 56
_HEAD: Final = "# Made by `imdsproxy config import`. Other settings have their defaults: see `imdsproxy config sample`."
_BY_HAND: Final = """\
# To be added: Neutron's agents used RPC. imdsproxy uses Neutron's API, and no file has its address. Remove the first #
# of these lines, and name a cloud of /etc/openstack/clouds.yaml, or the URL of a Neutron without Keystone.
#sources:
#  neutron:
#    enabled: true
#    cloud: CLOUD
#    # endpoint: http://127.0.0.1:9696
"""
_OVN: Final = """\
unix_listener.take_over: true, because {} shows that the agent is OVN's. The agent listens \
on the socket and makes the networks' namespaces, so the agent must keep running. imdsproxy takes the path from the \
agent when imdsproxy starts, and each time that the agent starts. How to check first, and the way back: \
docs/how-to/behind-neutrons-proxies.md"""

_Files: TypeAlias = "Sequence[Sequence[IniOption]]"


class _Read(NamedTuple):
    """An option, its occurrence that counts, and its value; `None` if no file has it, or the value is refused."""

    option: NeutronOption
    written: IniOption | None
    value: str | None

    @property
    def or_default(self) -> str:
        return self.value or self.option.default

    @property
    def is_true(self) -> bool:
        return (self.value or "").lower() in TRUE_WORDS


@dataclass(frozen=True, slots=True)
class Imported:
    """Settings file, secret file and report of an import.

    Attributes:
        text: The settings file; it also loads with the first # removed from its last lines.
        report: Report for JSON: `options` with the translation of each; `overridden`, values without effect, each with
            the later value of the same option in `by`; `doubtful`, unknown options, which Neutron ignores too, each
            with the known name in `near`; `ovn`, the evidence that the agent is OVN's, if any: its database, or any
            option of a file with its name; `others`, the number of irrelevant options; `secret_file`, as given.
    """

    settings: Mapping[str, Any]
    text: str
    secret: str
    secret_from: IniOption
    report: Mapping[str, Any]


def plan_import(
    files: _Files,
    secret_file: Path,
    *,
    agent_user: str = "neutron",
    server_name: str | None = None,
    behind_proxies: bool = True,
) -> Imported:
    """Translate Neutron's files.

    Args:
        files: Options of each file, in the order in which the agent reads the files: later files win. Nova's files may
            be among them, and are recognised by their sections.
        server_name: The name in the certificate of a Nova whose URL has an address.
        behind_proxies: Serve on the socket to which the agents' proxies connect, and query Neutron.

    Raises `ConfigInvalid`: Neutron or imdsproxy would refuse values; `problems` has all, with file and line.
    """
    reading = _Reading(files)
    url = reading.url()
    secret = reading.secret()
    _put_settings(reading, url, secret_file, server_name)
    if behind_proxies:
        _put_unix_listener(reading, agent_user)
    if not reading.problems:
        reading.problems += reading.breaches()
    if reading.problems or secret is None:
        count = len(reading.problems)
        raise ConfigInvalid(
            f"Neutron's files have {count} problem{'s' if count != 1 else ''}",
            problems=reading.problems,
        )
    report = {
        "options": list(reading.fates()),
        "overridden": list(reading.overridden()),
        "doubtful": list(reading.doubtful()),
        "ovn": None if reading.ovn is None else _where(reading.ovn),
        "others": len({(one.section, one.name) for one in reading.each} - _OPTIONS.keys()),
        "secret_file": str(secret_file),
    }
    text = reading.render(asks_neutron=behind_proxies)
    return Imported(reading.settings, text, *secret, report)


def render_report(imported: Imported, written: Collection[Path]) -> Iterator[str]:
    """Render the report for operators, a line each; `written` are the files that were written."""
    report, at = imported.report, imported.secret_from

    def with_fate(fate: Fate) -> Iterator[str]:
        for one in report["options"]:
            if one["fate"] == fate.value:
                becomes = f"{one['setting']}. " if one["setting"] else ""
                yield f"{_place(one)}: {becomes}{one['why']}"

    by_hand = [
        "sources.neutron: add the address of Neutron's API; see the last lines of the settings"
    ]
    if Path(report["secret_file"]) not in written:
        expanded = "" if imported.secret == at.value else ", with the values of its $ names"
        by_hand.append(
            f"{report['secret_file']}: put the value of {at.name} ({at.file}:{at.line}) there"
            f"{expanded}, with mode 0600; --secret-file writes it"
        )
    ovn = [] if report["ovn"] is None else [_OVN.format(_place(report["ovn"]))]
    groups = {
        "taken over": [*with_fate(Fate.TAKEN), *ovn],
        "to be done by hand": [*by_hand, *with_fate(Fate.BY_HAND)],
        "no equivalent": [*with_fate(Fate.NONE)],
        "without effect": [
            f"{_place(one)}: {one['by']['file']}:{one['by']['line']} wins"
            for one in report["overridden"]
        ],
        "ignored by Neutron too": [
            f"{_place(one)}: there is no such option; did you mean {one['near']}?"
            for one in report["doubtful"]
        ],
    }
    for title, lines in groups.items():
        yield from [title, *(f"  {line}" for line in lines)] if lines else []
    yield f"{report['others']} other options do not concern imdsproxy"
    yield from (f"written: {path}" for path in written)


def _where(at: IniOption) -> dict[str, Any]:
    return {"section": at.section, "option": at.name, "file": at.file, "line": at.line}


def _place(where: Mapping[str, Any]) -> str:
    return "[{section}] {option} ({file}:{line})".format_map(where)


class _Reading:
    """Files as their services read them, their problems, and the resulting settings."""

    def __init__(self, files: _Files) -> None:
        self._neutrons = [one for one in files if not _is_novas(one)]
        self._novas = [one for one in files if _is_novas(one)]
        self.each = [option for file in files for option in file]
        self.problems: list[Problem] = []
        self.settings: dict[str, Any] = {}
        self._origins: dict[str, list[IniOption]] = {}
        self._comments: dict[str, str] = {}
        self._read = {option: self._read_option(option) for option in NEUTRON_OPTIONS}

    def files_of(self, option: NeutronOption) -> _Files:
        return self._novas if option.whose == NOVA else self._neutrons

    def __getitem__(self, name: str | tuple[str, str]) -> _Read:
        """Return an option of [DEFAULT], or of a section."""
        return self._read[_OPTIONS[("DEFAULT", name) if isinstance(name, str) else name]]

    def _read_option(self, option: NeutronOption) -> _Read:
        files = self.files_of(option)
        written = find_option(files, option.names)
        absent = _Read(option, written, None)
        if written is None:
            return absent
        try:
            value = _expand(files, written)
        except ValueError as error:
            # An option that is not taken over may refer to values that this host's files lack.
            if option.fate is not Fate.NONE:
                self._refuse(absent, str(error), "write the value itself")
            return absent
        if not option.accepts(value):
            shown = "its value" if option.secret else render_value(value)
            self._refuse(absent, f"{shown} is not acceptable", f"Neutron takes {option.takes}")
            return absent
        return _Read(option, written, value)

    def _refuse(self, read: _Read, reason: str, hint: str = "") -> None:
        nowhere = Problem(f"[DEFAULT] {read.option.name}", reason, hint)
        at = read.written
        self.problems.append(_problem(at, reason, hint) if at else nowhere)

    def put(
        self, path: str, value: object, *options: _Read, otherwise: str = "Neutron's default"
    ) -> None:
        """Set a setting, unless to `None`, and note the options it comes from, or else the comment."""
        if value is None:
            return
        *sections, name = path.split(".")
        inside = self.settings
        for section in sections:
            inside = inside.setdefault(section, {})
        inside[name] = value
        written = self._origins[path] = [one.written for one in options if one.written]
        places = ", ".join(f"{one.file}:{one.line}" for one in written) or otherwise
        # The name of a file may hold any character, even a line end.
        self._comments[path] = "".join(one if one.isprintable() else "?" for one in places)

    def copy(self, *names: str) -> None:
        """Copy options' values to their settings; an empty value sets nothing."""
        for one in map(self.__getitem__, names):
            self.put(one.option.becomes, one.value or None, one)

    def render(self, *, asks_neutron: bool) -> str:
        lines = [_HEAD]
        for node, line in render_nodes(walk_values(self.settings)):
            if len(node.place) == 1:
                lines.append("")
            comment = self._comments.get(node.path.removesuffix("[0].url"))
            lines.append(line if node.opens else f"{line.ljust(_COLUMN)} # {comment}")
        host = self["host"].value
        listed = f"#    # list_host: {render_value(host)}\n" if host else ""
        return "\n".join([*lines, "", _BY_HAND + listed if asks_neutron else ""])

    @property
    def has_client(self) -> bool:
        """Return whether Neutron identifies itself to Nova with a certificate."""
        return all(self[name].value for name in _CLIENT)

    @property
    def ovn(self) -> IniOption | None:
        """The option that shows that these are files of OVN's agent."""
        ours = [one for file in self._neutrons for one in file]
        asks = (one for one in ours if one.section == "ovn" and one.name.startswith("ovn_sb_"))
        named = (one for one in ours if _OVNS_FILE.search(Path(one.file).name))
        return next(asks, None) or next(named, None)

    def url(self) -> str:
        """Return Nova's URL; empty if it is refused."""
        host = self["nova_metadata_host"]
        scheme, port = (self[f"nova_metadata_{one}"].or_default for one in ("protocol", "port"))
        name = host.option.default if host.value is None else host.value
        # Neutron adds brackets to IPv6 addresses itself; before that, operators wrote the brackets.
        bracketed = f"[{name}]" if ":" in name and not name.startswith("[") else name
        try:
            return str(parse_nova_url(f"{scheme}://{bracketed}:{int(port)}"))
        except ValueError as error:
            self._refuse(host, str(error), "takes a name or an address")
            return ""

    def secret(self) -> tuple[str, IniOption] | None:
        """Return the secret that signs requests, and its option; `None` if it is refused."""
        name = "metadata_proxy_shared_secret"
        ours, novas = self[name], self["neutron", name]
        found = ours if ours.value else novas
        if not found.value or found.written is None:
            at = novas if novas.written and not ours.written else ours
            empty = "is empty: every guest could forge what it signs"
            reason = empty if at.written else "is in none of the files: nothing could be signed"
            self._refuse(at, reason, "give Neutron and Nova the same long, random one")
            return None
        if found is ours and novas.value and novas.written and ours.value != novas.value:
            reason = f"differs from the one in {novas.written.file}:{novas.written.line}"
            self._refuse(found, reason, "make both equal, or Nova answers 403")
        if found.value != found.value.strip():
            reason = "begins or ends with a blank, which a secret file cannot have"
            self._refuse(found, reason)
        return found.value, found.written

    def breaches(self) -> Iterator[Problem]:
        """Yield problems that imdsproxy has with the settings, reported at Neutron's file."""
        try:
            Settings.model_validate(self.settings)
        except ValidationError as error:
            for finding in map(explain_finding, error.errors()):
                found = self._origins.get(finding.field.removesuffix("[0].url"))
                if finding.field == f"{_SET}.server_name" and not found:
                    found = self._origins[f"{_SET}.endpoints"]
                    finding = replace(finding, hint="give it with --server-name")  # noqa: PLW2901 - the same finding
                if found:
                    reason = f"{finding.field} {finding.reason}"
                    finding = _problem(found[0], reason, finding.hint)  # noqa: PLW2901 - as above
                yield finding

    def fates(self) -> Iterator[dict[str, Any]]:
        for read in self._read.values():
            option, written = read.option, read.written
            if written is None:
                continue
            fate, why, name = option.fate, option.why, option.name
            if name in _CLIENT and option.becomes:
                if not self.has_client:
                    fate, why = Fate.NONE, "Neutron uses neither of the two where one is empty."
            elif written.name != name:
                why = f"Of old, for `{name}`. {why}"
            elif option.unless is read.is_true:
                fate = Fate.NONE
            becomes = option.becomes if fate is not Fate.NONE else ""
            yield {**_where(written), "fate": fate.value, "setting": becomes or None, "why": why}

    def overridden(self) -> Iterator[dict[str, Any]]:
        """Yield values without effect, each with the later value of the same option."""
        for option, chosen, _ in self._read.values():
            files = self.files_of(option)
            for one in (one for file in files for one in file):
                same = chosen and (one.section, one.name) in option.names
                if chosen and same and _expanded(files, one) != _expanded(files, chosen):
                    yield {**_where(one), "by": _where(chosen)}

    def doubtful(self) -> Iterator[dict[str, Any]]:
        """Yield unknown options, each with a similar known name."""
        known = [name for section, name in _OPTIONS if section == "DEFAULT"]
        for one in self.each:
            name = one.name.replace("-", "_")
            if (one.section, one.name) in _OPTIONS or not name.startswith(("metadata_", "nova_")):
                continue
            near = difflib.get_close_matches(name, known, n=1, cutoff=_LIKE)
            if near and one.section == "DEFAULT":
                yield {**_where(one), "near": near[0]}


def _put_settings(reading: _Reading, url: str, secret_file: Path, server_name: str | None) -> None:
    host, port, scheme = (reading[f"nova_metadata_{one}"] for one in ("host", "port", "protocol"))
    wait, insecure = (
        reading["metadata_haproxy", "timeout_server"],
        reading["nova_metadata_insecure"],
    )
    put = reading.put
    put(f"{_SET}.endpoints", [{"url": url}], scheme, host, port)
    in_file = "its value is Neutron's metadata_proxy_shared_secret"
    put(f"{_SET}.secret_file", str(secret_file), otherwise=in_file)
    reading.copy("auth_ca_cert")
    put(f"{_SET}.verify", False if insecure.is_true else None, insecure)
    put(f"{_SET}.server_name", server_name, otherwise="as given")
    if reading.has_client:
        reading.copy(*_CLIENT)
    if wait.value:
        low, high = _RESPONSE_S
        seconds = min(max(int(wait.value) - _BEFORE_THE_FRONT_S, low), high)
        put("nova.response_timeout_s", seconds, wait)
    put("documents.enabled", value=False, otherwise="all documents are Nova's")


def _put_unix_listener(reading: _Reading, agent_user: str) -> None:
    state, socket = reading["state_path"], reading["metadata_proxy_socket"]
    put = reading.put
    put("unix_listener.enabled", value=True, otherwise="in the place of neutron-metadata-agent")
    put("unix_listener.path", f"{state.or_default}/metadata_proxy", state)
    put("unix_listener.path", socket.value, socket)
    if reading.ovn:
        runs_on = "OVN's agent listens there and must keep running"
        put("unix_listener.take_over", value=True, otherwise=runs_on)
    reading.copy("metadata_proxy_socket_mode")
    whom = "account of Neutron's agents; no file has it"
    put("unix_listener.user", agent_user, otherwise=whom)
    put("unix_listener.group", agent_user, otherwise="its group")
    reading.copy("metadata_proxy_user", "metadata_proxy_group")


def _expand(files: _Files, written: IniOption) -> str:
    def look_up(name: str) -> str | None:
        """Return the value of `$name`, as written in the files, or Neutron's default."""
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

    return expand_value(written.value, look_up)


def _expanded(files: _Files, written: IniOption) -> str:
    """Expand the value; return it as written if it refers to a missing option."""
    try:
        return _expand(files, written)
    except ValueError:
        return written.value


def _is_novas(options: Sequence[IniOption]) -> bool:
    return any(one.section in _SECTIONS_OF_NOVA for one in options)


def _problem(at: IniOption, reason: str, hint: str) -> Problem:
    return Problem(f"[{at.section}] {at.name}", reason, hint, at.file, at.line)
