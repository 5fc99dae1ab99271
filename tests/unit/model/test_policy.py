"""The table of policy rules, how scopes are folded, the word that is derived from both, and what `explain` says."""

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imdsproxy.fleet.guests import FleetPolicies, join_fleet_overrides
from imdsproxy.model.entities import InstanceId
from imdsproxy.model.path_rules import PathRules, PathWord, set_id
from imdsproxy.model.policy import (
    DEFAULT,
    NO_RULES,
    FleetRules,
    Folded,
    OperatorOverride,
    Policy,
    PolicyBook,
    PolicyPlace,
    PolicyRules,
    PolicyScope,
    TokenMode,
    fold_policy,
    render_policy_word,
    rule_set_of,
)
from imdsproxy.model.policy_report import DEFAULT_ORIGIN, decide_read, report_policy
from imdsproxy.model.retired import Overrides
from imdsproxy.model.tokens import TokenKey
from support.access_table import READS, Read

_REQUIRED = PolicyRules(tokens=TokenMode.REQUIRED)
_OFF = PolicyRules(tokens=TokenMode.OFF)
_PLACE = PolicyPlace("red", "acme", "web")
_BORN = 1_795_000_000
_OF_ACME = FleetRules(projects={"acme": _REQUIRED})
_RECORDS = replace(_PLACE, of_network=_OFF, of_instance=_OFF)


@pytest.mark.parametrize(
    ("place", "book", "mode"),
    [
        (_PLACE, PolicyBook(), TokenMode.OPTIONAL),
        (_PLACE, PolicyBook(host=_REQUIRED), TokenMode.REQUIRED),
        (_PLACE, PolicyBook(host=_REQUIRED, networks={"red": _OFF}), TokenMode.OFF),
        (_PLACE, PolicyBook(networks={"red": _OFF}, projects={"acme": _REQUIRED}), TokenMode.REQUIRED),
        (_PLACE, PolicyBook(projects={"acme": _OFF}, instances={"web": _REQUIRED}), TokenMode.REQUIRED),
        (_PLACE, PolicyBook(networks={"blue": _REQUIRED}, projects={"b": _OFF}), TokenMode.OPTIONAL),
        (replace(_PLACE, of_network=_REQUIRED), PolicyBook(), TokenMode.REQUIRED),
        # Settings win over a record of the same scope.
        (replace(_RECORDS, of_instance=NO_RULES), PolicyBook(networks={"red": _REQUIRED}), TokenMode.REQUIRED),
        (_RECORDS, PolicyBook(networks={"red": _REQUIRED}), TokenMode.OFF),
        (_RECORDS, PolicyBook(instances={"web": _REQUIRED}), TokenMode.REQUIRED),
        # What a fleet says of all hosts gives way to all else, what it says of one scope wins there.
        (_PLACE, PolicyBook(fleet=FleetRules(_REQUIRED)), TokenMode.REQUIRED),
        (_PLACE, PolicyBook(host=_REQUIRED, fleet=FleetRules(_OFF)), TokenMode.REQUIRED),
        (_PLACE, PolicyBook(host=_OFF, fleet=FleetRules(host=_REQUIRED)), TokenMode.REQUIRED),
        (_PLACE, PolicyBook(networks={"red": _OFF}, fleet=FleetRules(host=_REQUIRED)), TokenMode.OFF),
        (_PLACE, PolicyBook(projects={"acme": _OFF}, fleet=_OF_ACME), TokenMode.REQUIRED),
        (_PLACE, PolicyBook(instances={"web": _OFF}, fleet=_OF_ACME), TokenMode.OFF),
        (replace(_PLACE, project="other"), PolicyBook(fleet=_OF_ACME), TokenMode.OPTIONAL),
    ],
)  # fmt: skip
def test_an_instances_word_counts_before_its_projects_its_networks_and_the_hosts(
    place: PolicyPlace, book: PolicyBook, mode: TokenMode
) -> None:
    assert book.fold(place).policy.tokens is mode


_DENIED: PathRules = (("/latest/user-data", PathWord.DENY),)
_NO_TOKENS = Policy(
    tokens=TokenMode.OFF, openstack_tokens=TokenMode.OFF, nocloud_tokens=TokenMode.OFF
)
_SEALED = Policy(seal_user_data=True)
_REOPENED = OperatorOverride(reopened_at=_BORN + 5000)


def _path(path: str, word: PathWord) -> Policy:
    return Policy(tokens=TokenMode.OFF, paths=((path, word),))


@pytest.mark.parametrize(
    ("policy", "override", "created_at", "word"),
    [
        # A boot that ends later is no difference while nothing depends on its end.
        (DEFAULT, OperatorOverride(), _BORN, ""),
        *(
            (policy, OperatorOverride(), _BORN, word)
            for policy, word in (
                # A path that takes a token has tokens given, and in other trees the boot counts.
                (_path("/", PathWord.REQUIRED), "+1tooo--bp::1795000900:64::::{set}"),
                (_path("/openstack/latest/user_data", PathWord.REQUIRED), "+1tooo--bp::1795000900:64::::{set}"),
                (_path("/nocloud", PathWord.REQUIRED), "+1tooo--bp::1795000900:64::::{set}"),
                (_path("/latest/user-data", PathWord.REQUIRED), "+1tooo---p::1795000900:64::::{set}"),
                *((_path("/openstack", word), "+1-ooo---p::1795000900:64::::{set}")
                  for word in PathWord if word is not PathWord.REQUIRED),
                (Policy(endpoint=False), "+0tooo---::1795000900:64"),
                (Policy(tokens=TokenMode.REQUIRED), "+1troo---::1795000900:64"),
                (Policy(openstack_tokens=TokenMode.REQUIRED), "+1toro--b::1795000900:64"),
                (Policy(nocloud_tokens=TokenMode.REQUIRED), "+1toor--b::1795000900:64"),
                (Policy(refuse_forwarded=True), "+1tooog--::1795000900:64"),
                (Policy(seal_user_data=True, boot_grace_s=60), "+1tooo-sb::1795000060:64"),
                (Policy(hop_limit=1), "+1tooo---::1795000900:1"),
                (Policy(requests_per_s=20), "+1tooo---::1795000900:64:20::"),
                (Policy(burst=300), "+1tooo---::1795000900:64::300:"),
                (Policy(connections=8), "+1tooo---::1795000900:64:::8"),
                (Policy(paths=_DENIED), "+1tooo---p::1795000900:64::::{set}"),
                (replace(_NO_TOKENS, paths=_DENIED), "+1-ooo---p::1795000900:64::::{set}"),
                (Policy(burst=3, paths=_DENIED), "+1tooo---p::1795000900:64::3::{set}"),
                # There is a token route where a tree takes tokens.
                (_NO_TOKENS, "+1-ooo---::1795000900:64"),
                (Policy(tokens=TokenMode.OFF), "+1-ooo---::1795000900:64"),
                (replace(_NO_TOKENS, openstack_tokens=TokenMode.REQUIRED), "+1toro--b::1795000900:64"),
            )
        ),
        # Revoked tokens are of another epoch, whatever the policy.
        (DEFAULT, OperatorOverride(epoch=3), _BORN, "+1tooo---:3:1795000900:64"),
        # Without a creation time the boot is over; an operator opens it again.
        (_SEALED, OperatorOverride(), None, "+1tooo-sb::0:64"),
        (_SEALED, _REOPENED, _BORN, f"+1tooo-sb::{_BORN + 5900}:64"),
        (_SEALED, _REOPENED, None, f"+1tooo-sb::{_BORN + 5900}:64"),
    ],
)  # fmt: skip
def test_each_rule_has_its_place_in_the_word(
    policy: Policy, override: OperatorOverride, created_at: int | None, word: str
) -> None:
    paths = set_id(policy.paths) if policy.paths else None
    word = word.format(set=paths)
    assert render_policy_word(policy, override, created_at) == word
    assert rule_set_of(word) == rule_set_of(f"{word}|web|r1") == paths


def test_every_rule_and_path_is_reported_with_its_value_and_scope() -> None:
    host = PolicyRules(
        tokens=TokenMode.REQUIRED, seal_user_data=True, paths=(("/", PathWord.DENY),)
    )
    project = PolicyRules(paths=(("/latest", PathWord.OPTIONAL),))
    folded = fold_policy(
        [(PolicyScope.HOST, host), (PolicyScope.PROJECT, project), (PolicyScope.INSTANCE, _OFF)]
    )
    report = report_policy(folded, OperatorOverride(), None, _BORN, "")
    names = [one.name for one in fields(Policy) if one.name != "paths"]
    assert [rule.name for rule in report.rules] == [*names, "paths./", "paths./latest"]
    by_name = {rule.name: (rule.value, rule.origin) for rule in report.rules}
    assert by_name["tokens"] == ("off", "instance")
    assert by_name["seal_user_data"] == (True, "host")
    assert by_name["hop_limit"] == (64, DEFAULT_ORIGIN)
    assert by_name["paths./"] == ("deny", "host")
    assert by_name["paths./latest"] == ("optional", "project")


def test_of_one_scope_a_fleet_sets_rule_by_rule_and_each_names_whose_it_is() -> None:
    host = PolicyRules(tokens=TokenMode.OFF, hop_limit=1, paths=(("/latest", PathWord.DENY),))
    of_fleet = PolicyRules(tokens=TokenMode.REQUIRED, paths=(("/nocloud", PathWord.DENY),))
    everywhere = PolicyRules(seal_user_data=True, hop_limit=2)
    book = PolicyBook(host=host, fleet=FleetRules(everywhere, of_fleet))
    assert dict(book.fold(_PLACE).origins) == {
        "tokens": PolicyScope.FLEET_HOST,
        "hop_limit": PolicyScope.HOST,
        "seal_user_data": PolicyScope.FLEET,
        "paths./latest": PolicyScope.HOST,
        "paths./nocloud": PolicyScope.FLEET_HOST,
    }


# What operators do

_OVERRIDES = st.builds(OperatorOverride, st.integers(0, 3), st.integers(0, 3))
_KEYS = (TokenKey(b"k" * 32),)


@given(ours=_OVERRIDES, theirs=_OVERRIDES, keyed=st.booleans())
def test_each_revocation_of_a_fleet_ends_the_tokens_of_before_whatever_this_host_has_revoked(
    ours: OperatorOverride, theirs: OperatorOverride, *, keyed: bool
) -> None:
    keys = {InstanceId("web"): _KEYS} if keyed else {}

    def in_force(one: OperatorOverride) -> OperatorOverride:
        own = Overrides({"web": ours, "other": ours})
        joined = join_fleet_overrides(own, FleetPolicies(overrides={"web": one}, keys=keys))
        assert joined["other"] == ours
        return joined["web"]

    now = in_force(theirs)
    assert now.reopened_at == max(ours.reopened_at, theirs.reopened_at)
    assert in_force(replace(theirs, epoch=theirs.epoch + 1)).epoch > now.epoch
    # Tokens go on being good on the next host, which has revoked nothing.
    assert not keyed or now.epoch == theirs.epoch
    assert keyed or now.epoch >= ours.epoch


def test_what_this_host_revoked_before_an_instance_came_to_a_fleet_is_none_of_its_fleets_tokens() -> (
    None
):
    fleet = FleetPolicies(keys={InstanceId("web"): _KEYS})
    own = Overrides({"web": OperatorOverride(3, 7)})
    assert join_fleet_overrides(own, fleet) == Overrides({"web": OperatorOverride(0, 7)})


@pytest.mark.parametrize(
    ("created_at", "reopened_at", "now", "ends", "over"),
    [
        (None, 0, _BORN, None, True),
        (_BORN, 0, _BORN, _BORN + 60, False),
        (_BORN, 0, _BORN + 59, _BORN + 60, False),
        (_BORN, 0, _BORN + 60, _BORN + 60, True),
        (_BORN, _BORN + 100, _BORN + 60, _BORN + 160, False),
        (_BORN, _BORN - 100, _BORN + 60, _BORN + 60, True),
        (None, _BORN, _BORN, _BORN + 60, False),
        # Clocks that are wrong: this host's has been set back by years, or the one by which it was made is ahead.
        (_BORN, 0, _BORN - 9 * 365 * 86_400, _BORN + 60, True),
        (_BORN + 8 * 86_400, 0, _BORN, _BORN + 8 * 86_400 + 60, True),
        (_BORN, 0, _BORN - 604_740, _BORN + 60, False),
        (_BORN, 0, _BORN - 604_741, _BORN + 60, True),
    ],
)
def test_the_end_of_the_boot_is_the_one_that_haproxy_sees(
    created_at: int | None, reopened_at: int, now: int, ends: int | None, *, over: bool
) -> None:
    folded = Folded(Policy(boot_grace_s=60))
    override = OperatorOverride(3, reopened_at)
    word = render_policy_word(folded.policy, override, created_at)
    told = report_policy(folded, override, created_at, now, word)
    assert (told.boot_ends_at, told.boot_over) == (ends, over)
    assert (told.token_epoch, told.reopened_at) == (3, reopened_at or None)


_NOW = 1_795_000_000


@pytest.mark.parametrize("read", READS, ids=lambda read: f"{read.rule or 'passes'} {read.target}")
def test_the_decision_is_that_of_the_table(read: Read) -> None:
    word, _ = read.word(_NOW)
    for token, status in ((False, read.without), (True, read.with_token)):
        decided = decide_read(word, _NOW, read.target, token=token, paths=read.policy.paths)
        assert (decided.status or 200, decided.rule) == (status, read.rule if status != 200 else "")
        assert bool(decided.rule) == bool(decided.why) == (decided.status is not None)
