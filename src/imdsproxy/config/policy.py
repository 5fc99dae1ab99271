"""Settings about guests' permissions, tokens, limits and the audit log."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import AfterValidator, Field, create_model
from pydantic_core import PydanticCustomError

from imdsproxy.config.section import (
    AbsolutePath,
    Change,
    Identifier,
    Listed,
    OffIsFalse,
    Section,
    cross,
    form,
    section,
    setting,
)
from imdsproxy.model.path_rules import MOST_PATH_RULES, PathWord, find_path_fault
from imdsproxy.model.policy import (
    AUDIENCE_RULE,
    MOST_NAMES,
    NO_RULES,
    RULES,
    TAG_RULE,
    PolicyBook,
    PolicyRules,
    Rule,
    TokenMode,
)
from imdsproxy.model.wire import ONE_IN

_Mode = Annotated[Literal["off", "optional", "required"], OffIsFalse]
_Share = Annotated[Literal["off", "sampled", "all"], OffIsFalse]


def _writable(path: str) -> str:
    fault = find_path_fault(path)
    if fault is not None:
        raise cross((), *fault)
    return path


_NAMES: Final = {
    AUDIENCE_RULE: "an audience: a name, as vault, a URL, or * for any",
    TAG_RULE: "a tag's name",
}
"""Names of a rule in words, by their pattern."""

_Paths = Annotated[
    dict[
        Annotated[str, AfterValidator(_writable)], Literal["deny", "allow", "required", "optional"]
    ],
    Field(max_length=MOST_PATH_RULES),
]


def _field(rule: Rule) -> tuple[Any, Any]:
    if rule.kind is tuple:
        return _Paths | None, setting({}, Change.LIVE, description=rule.help)
    if rule.names is not None:
        text = f"{rule.help} Null leaves it to the less specific scope."
        names = Listed[Annotated[str, form(rule.names, _NAMES[rule.names])]]
        return names | None, setting(None, Change.LIVE, description=text, max_length=MOST_NAMES)
    least, most = rule.bounds or (None, None)
    text = f"{rule.help} Null leaves it to the less specific scope."
    kind: Any = _Mode if rule.kind is TokenMode else rule.kind
    return kind | None, setting(None, Change.LIVE, description=text, ge=least, le=most)


if TYPE_CHECKING:
    _Rules = Section
else:
    _fields = {rule.name: _field(rule) for rule in RULES.values()}
    _Rules = create_model("_Rules", __base__=Section, **_fields)


class PolicyRulesSettings(_Rules):
    """The rules of one scope."""

    def rules(self) -> PolicyRules:
        """Convert to the core's rules."""
        values = ((rule, getattr(self, rule.name)) for rule in RULES.values())
        rules = {rule.name: _of_core(rule, value) for rule, value in values if value is not None}
        return PolicyRules(**rules) if rules else NO_RULES


def _of_core(rule: Rule, value: Any) -> Any:
    if rule.kind is tuple:
        return tuple(sorted((path, PathWord(word)) for path, word in value.items())) or None
    if rule.names is not None:
        return tuple(sorted(set(value)))
    return TokenMode(value) if rule.kind is TokenMode else value


class PolicySettings(Section):
    """Policy rules by scope. For each rule, the most specific scope wins: instance, project, network, host."""

    host: PolicyRulesSettings = section(PolicyRulesSettings)
    """Rules for every guest of this host."""

    networks: dict[Identifier, PolicyRulesSettings] = setting({}, Change.LIVE)
    """Sections by a network's id, or by a router's id if guests are reached through the router."""

    projects: dict[Identifier, PolicyRulesSettings] = setting({}, Change.LIVE)
    """Sections by a project's id."""

    instances: dict[Identifier, PolicyRulesSettings] = setting({}, Change.LIVE)
    """Sections by an instance's id."""

    def book(self) -> PolicyBook:
        """Convert to the core's policies, without operators' overrides."""
        return PolicyBook(
            host=self.host.rules(),
            networks=_each(self.networks),
            projects=_each(self.projects),
            instances=_each(self.instances),
        )


def _each(sections: Mapping[str, PolicyRulesSettings]) -> dict[str, PolicyRules]:
    return {name: one.rules() for name, one in sections.items()}


class TokensSettings(Section):
    """Session tokens: their keys, and whether reads without tokens are counted."""

    count_reads: _Share = setting("sampled", Change.RELOAD)
    """Reads without a token, where none is required, that are counted for `imdsproxy token report`: none, one read in
    20 by chance, or each. `sampled` costs HAProxy 1 to 5 % more instructions a request and finds a guest that reads a
    hundred times; `all` costs 9 to 53 % more, and finds a guest that reads once. Reads that are refused because a token
    is required are always counted.
    """

    key_file: AbsolutePath | None = setting(None, Change.LIVE)
    """File of the keys, one a line in base64, the signing key first; only root may access the file. Hosts that share a
    file accept each other's tokens, so that a token works after a migration. Null is `token-keys` in `paths.state_dir`,
    which is created at the first start; any other file must exist. The file is read again at each reload.
    """

    @property
    def one_in(self) -> int:
        """Sampling rate: one read without a token in this many is counted; 0 for none."""
        return {"off": 0, "sampled": ONE_IN, "all": 1}[self.count_reads]


def _number(rule: str, default: int) -> Any:
    least, most = RULES[rule].bounds or (None, None)
    return setting(default, Change.RELOAD, ge=least, le=most)


class LimitsSettings(Section):
    """Limits of each instance, over IPv4 and IPv6 together; beyond, 503 with Retry-After. `policy` overrides them."""

    enabled: bool = setting(True, Change.RELOAD)
    """Count and limit each instance's requests. If disabled, limits in `policy` have no effect either."""

    requests_per_s: int = _number("requests_per_s", 100)
    """Requests a second on average. Only answered requests count, so refused requests do not prolong the refusal."""

    burst: int = _number("burst", 4000)
    """Requests at once, for boots: cloud-init's whole crawl has 150 requests, so the default allows more than twenty
    crawls. Requests are counted over the time that this many take at `requests_per_s`: 40 seconds with the defaults.
    """

    connections: int = _number("connections", 160)
    """Connections at once; behind the unix listener, requests. The most is `haproxy.maxconn_per_network`. The first 32
    connections beyond the limit get 503, further ones are closed.
    """

    body_kib: int = setting(1024, Change.RELOAD, ge=1, le=1024 * 1024)
    """Longest body of a request that goes to Nova, in KiB; beyond, 413. For requests that imdsproxy answers itself, 64.
    """


def _destination(text: str) -> str:
    if text != "journal" and not Path(text).is_absolute():
        raise PydanticCustomError("destination", "neither `journal` nor an absolute path")
    return text


class AuditSettings(Section):
    """The audit log: one JSON line for each request and its answer."""

    mode: _Share = setting("off", Change.RELOAD)
    """Requests that have a line: none, one of `sample` by chance, or each. Off by default, because a line costs
    HAProxy 1 to 2 µs, up to a sixth of a request.
    """

    sample: int = setting(100, Change.RELOAD, ge=2, le=1_000_000)
    """Sampling rate of `sampled`: one request in this many has a line."""

    destination: Annotated[str, Field(min_length=1), AfterValidator(_destination)] = setting(
        "journal", Change.LIVE, examples=["journal", "/var/log/imdsproxy/audit.log"]
    )
    """`journal`, or the absolute path of a file, mode 0640. The journal gets at most 300 lines a second, because
    systemd's journal accepts little more from one service. The file may be renamed at any time (logrotate): a new file
    is then begun.
    """

    @property
    def one_in(self) -> int:
        """Sampling rate: one request in this many has a line; 0 for none."""
        return {"off": 0, "sampled": self.sample, "all": 1}[self.mode]
