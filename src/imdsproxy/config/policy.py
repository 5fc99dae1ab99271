"""What guests may read and how: for the host, and for networks, projects and instances by their ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, create_model

from imdsproxy.config.change import Change
from imdsproxy.config.section import (
    AbsolutePath,
    Identifier,
    OffIsFalse,
    Section,
    cross,
    section,
    setting,
)
from imdsproxy.core.haproxy.counting import ONE_IN
from imdsproxy.core.path_rules import (
    MOST_PATH_RULES,
    PathWord,
    find_path_fault,
    sort_paths,
)
from imdsproxy.core.policy import NO_RULES, RULES, PolicyBook, PolicyRules, Rule, TokenMode

_Mode = Annotated[Literal["off", "optional", "required"], OffIsFalse]


def _writable(path: str) -> str:
    fault = find_path_fault(path)
    if fault is not None:
        raise cross("", fault.reason, fault.hint)
    return path


_Paths = Annotated[
    dict[
        Annotated[str, AfterValidator(_writable)],
        Literal["deny", "allow", "required", "optional"],
    ],
    Field(max_length=MOST_PATH_RULES),
]


def _field(rule: Rule) -> tuple[Any, Any]:
    """A rule as pydantic's `create_model` takes it: its type and its field."""
    if rule.kind is tuple:
        return _Paths | None, setting({}, Change.LIVE, description=rule.help)
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
    """What one scope sets."""

    def rules(self) -> PolicyRules:
        """As the core has it."""
        values = ((rule, getattr(self, rule.name)) for rule in RULES.values())
        rules = {rule.name: _of_core(rule, value) for rule, value in values if value is not None}
        return PolicyRules(**rules) if rules else NO_RULES


def _of_core(rule: Rule, value: Any) -> Any:  # noqa: ANN401 - as pydantic checked it
    if rule.kind is tuple:
        return sort_paths((path, PathWord(word)) for path, word in value.items()) or None
    return TokenMode(value) if rule.kind is TokenMode else value


class PolicySettings(Section):
    """For each rule, the most specific scope wins: instance, project, network, host."""

    host: PolicyRulesSettings = section(PolicyRulesSettings)
    """For every guest of this host."""

    networks: dict[Identifier, PolicyRulesSettings] = setting({}, Change.LIVE)
    """Sections by a network's id, or by a router's where guests are reached by it."""

    projects: dict[Identifier, PolicyRulesSettings] = setting({}, Change.LIVE)
    """Sections by a project's id."""

    instances: dict[Identifier, PolicyRulesSettings] = setting({}, Change.LIVE)
    """Sections by an instance's id."""

    def book(self) -> PolicyBook:
        """As the core has it, without what operators did."""
        return PolicyBook(
            host=self.host.rules(),
            networks=_each(self.networks),
            projects=_each(self.projects),
            instances=_each(self.instances),
        )


def _each(sections: Mapping[str, PolicyRulesSettings]) -> dict[str, PolicyRules]:
    return {name: one.rules() for name, one in sections.items()}


class TokensSettings(Section):
    """Session tokens: their keys, and whether reads without them are counted."""

    count_reads: Annotated[Literal["off", "sampled", "all"], OffIsFalse] = setting(
        "sampled",
        Change.RELOAD,
        description="Count, for `imdsproxy token report`, who reads without a token where none is required: none, one "
        f"read in {ONE_IN} by chance, or each. A sample costs HAProxy 1 to 5 % more instructions a request and finds "
        "a guest that reads a hundred times; each costs 9 to 53 % more, and finds one that reads once. What is "
        "refused because a token is required is counted always, each time.",
    )

    key_file: AbsolutePath | None = setting(None, Change.LIVE)
    """File of the keys, one a line in base64, the one in force first; root's alone. Hosts that share it take each
    other's tokens, so that one works after a migration. Null is `token-keys` in `paths.state_dir`, which is made at
    the first start; another file has to be there. Read again at each reload.
    """

    @property
    def one_in(self) -> int:
        """Of so many reads without a token one is counted; 0 for none."""
        return {"off": 0, "sampled": ONE_IN, "all": 1}[self.count_reads]
