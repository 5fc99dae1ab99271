"""What guests may read and how: for the host, and for networks, projects and instances by their ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from imdsproxy.config.change import Change
from imdsproxy.config.section import (
    AbsolutePath,
    OffIsFalse,
    Section,
    cross,
    section,
    setting,
)
from imdsproxy.core.haproxy.counting import ONE_IN
from imdsproxy.core.model import ID_PATTERN
from imdsproxy.core.path_rules import (
    MOST_PATH_RULES,
    PathRules,
    PathWord,
    find_path_fault,
    sort_paths,
)
from imdsproxy.core.policy import (
    BOOT_GRACE_S,
    BOUNDS,
    PolicyBook,
    PolicyRules,
    TokenMode,
)

__all__ = ["PolicyRulesSettings", "PolicySettings", "TokensSettings"]

_Id = Annotated[str, Field(pattern=ID_PATTERN)]


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


def _rule(description: str, *, bounds: str | None = None) -> Any:  # noqa: ANN401 - as `setting`
    least, most = (None, None) if bounds is None else BOUNDS[bounds]
    text = f"{description} Null leaves it to the less specific scope."
    return setting(None, text, Change.LIVE, ge=least, le=most)


class PolicyRulesSettings(Section):
    """What one scope says."""

    endpoint: bool | None = _rule(
        "Serve at all; off, every request gets 403. On unless something says otherwise."
    )
    tokens: _Mode | None = _rule(
        "Session tokens (IMDSv2) for EC2's tree. `optional`: who sends a token must send a good one. `required`: 401 "
        "without. `off`: no tokens are given. `optional` unless something says otherwise."
    )
    openstack_tokens: _Mode | None = _rule(
        "The same for `/openstack`. No client of this tree sends tokens: `required` counts from the end of the boot "
        "on, and nothing of the tree is read then but by who was written for it."
    )
    nocloud_tokens: _Mode | None = _rule("The same for `/nocloud`, with the same caution.")
    boot_grace_s: int | None = _rule(
        f"Seconds after an instance's creation at which its boot is over; {BOOT_GRACE_S} unless something says "
        "otherwise. An instance of which no source tells when it was made has booted already.",
        bounds="boot_grace_s",
    )
    seal_user_data: bool | None = _rule(
        "Refuse user-data with 403 once the boot is over, until `imdsproxy instance reopen`. It often holds passwords, "
        "and is needed once."
    )
    refuse_forwarded: bool | None = _rule(
        "Refuse with 403 what a web application was tricked into asking (SSRF): requests without a token, the one for "
        "a token too, that have headers of proxies or browsers, or are for another host."
    )
    hop_limit: int | None = _rule(
        "How many hops the answer that holds a token goes (IP TTL, hop limit): at 1 it reaches no container behind "
        "the guest. 64, as the kernel sends by itself, unless something says otherwise; 47 goes as 46. It has no "
        "effect where guests come by the unix listener.",
        bounds="hop_limit",
    )

    requests_per_s: int | None = _rule(
        "Requests a second that an instance may make on average, over the time of `limits` (40 seconds). "
        "Where this or `burst` is said, `limits.requests_per_s` and `limits.burst` are of no account.",
        bounds="requests_per_s",
    )
    burst: int | None = _rule(
        "Requests of an instance in ten seconds, beside `requests_per_s` or alone.",
        bounds="burst",
    )
    connections: int | None = _rule(
        "Connections of an instance at once; `limits.connections` unless something says otherwise.",
        bounds="connections",
    )

    paths: _Paths | None = setting(
        {},
        "What is said of single paths and what is beneath them, as `/latest/meta-data/tags: deny`; `latest` stands for "
        "every version. `deny`: 403. `required`: 401 without a token (in `/openstack` and `/nocloud` from the end of "
        "the boot on). `optional`: served without one although the tree takes it. `allow`: served as the tree is. "
        "The most specific scope that says something of a path decides, in it the longest.",
        Change.LIVE,
    )

    def rules(self) -> PolicyRules:
        """As the core has it."""
        return PolicyRules(
            endpoint=self.endpoint,
            tokens=_token_mode(self.tokens),
            openstack_tokens=_token_mode(self.openstack_tokens),
            nocloud_tokens=_token_mode(self.nocloud_tokens),
            boot_grace_s=self.boot_grace_s,
            seal_user_data=self.seal_user_data,
            refuse_forwarded=self.refuse_forwarded,
            hop_limit=self.hop_limit,
            requests_per_s=self.requests_per_s,
            burst=self.burst,
            connections=self.connections,
            paths=_paths(self.paths),
        )


def _paths(said: Mapping[str, str] | None) -> PathRules | None:
    return sort_paths((path, PathWord(word)) for path, word in (said or {}).items()) or None


def _token_mode(word: str | None) -> TokenMode | None:
    return None if word is None else TokenMode(word)


class PolicySettings(Section):
    """The most specific word on each rule wins: instance, project, network, host."""

    host: PolicyRulesSettings = section("For every guest of this host.", PolicyRulesSettings)
    networks: dict[_Id, PolicyRulesSettings] = setting(
        {},
        "Sections by a network's id, or by a router's where guests are reached by it.",
        Change.LIVE,
    )
    projects: dict[_Id, PolicyRulesSettings] = setting(
        {}, "Sections by a project's id.", Change.LIVE
    )
    instances: dict[_Id, PolicyRulesSettings] = setting(
        {}, "Sections by an instance's id.", Change.LIVE
    )

    def book(self) -> PolicyBook:
        """As the core has it, without what operators did."""
        return PolicyBook(
            host=self.host.rules(),
            networks=_each(self.networks),
            projects=_each(self.projects),
            instances=_each(self.instances),
        )


def _each(said: Mapping[str, PolicyRulesSettings]) -> dict[str, PolicyRules]:
    return {name: one.rules() for name, one in said.items()}


class TokensSettings(Section):
    """Session tokens: their keys, and whether reads without them are counted."""

    count_reads: Annotated[Literal["off", "sampled", "all"], OffIsFalse] = setting(
        "sampled",
        "Count, for `imdsproxy token report`, who reads without a token where none is required: none, one read in "
        f"{ONE_IN} by chance, or each. A sample costs HAProxy 1 to 5 % more instructions a request and finds whoever "
        "reads a hundred times; each costs 9 to 53 % more, and finds whoever reads once. What is refused because a "
        "token is required is counted always, each time.",
        Change.RELOAD,
    )

    key_file: AbsolutePath | None = setting(
        None,
        "File of the keys, one a line in base64, the one in force first; root's alone. Hosts that share it take each "
        "other's tokens, so that one works after a migration. Null is `token-keys` in `paths.state_dir`, which is "
        "made at the first start; another file has to be there. Read again at each reload.",
        Change.LIVE,
    )

    @property
    def one_in(self) -> int:
        """Of so many reads without a token one is counted; 0 for none."""
        return {"off": 0, "sampled": ONE_IN, "all": 1}[self.count_reads]
