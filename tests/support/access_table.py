"""What a guest may read, as a table of policy x request -> answer, for the pure decision and for a bare HAProxy."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final, TypeAlias

from imdsproxy.model.path_rules import PathRules, PathWord
from imdsproxy.model.policy import (
    BOOT_GRACE_S,
    LONGEST_BOOT_S,
    OperatorOverride,
    Policy,
    TokenMode,
    render_policy_word,
)

Clock: TypeAlias = Callable[[int], tuple[int | None, OperatorOverride]]
"""When the instance was made, and what an operator did about it, by the time that it is now."""

TOKEN: Final = "/latest/api/token"
USER_DATA: Final = "/latest/user-data"
META: Final = "/openstack/latest/meta_data.json"
NOCLOUD: Final = "/nocloud/user-data"
_HOSTNAME: Final = "/latest/meta-data/hostname"
_WEEK_S: Final = 7 * 86_400


def _made(ago_s: int) -> Clock:
    """An instance that was made so many seconds ago."""
    return lambda now: (now - ago_s, OperatorOverride())


CLOCKS: Final[Mapping[str, Clock]] = {
    "of unknown age": lambda _: (None, OperatorOverride()),
    "made long ago": _made(10 * LONGEST_BOOT_S),
    "made now": _made(0),
    "in the last second of its boot": _made(BOOT_GRACE_S - 1),
    "in the second after its boot": _made(BOOT_GRACE_S),
    "with the longest boot ahead": _made(BOOT_GRACE_S - LONGEST_BOOT_S),
    "with a second more ahead": _made(BOOT_GRACE_S - LONGEST_BOOT_S - 1),
    "made eight days ahead": _made(-8 * 86_400),
    "made in the last second of a signed 32-bit clock": lambda _: (2**31 - 1, OperatorOverride()),
    "reopened now": lambda now: (1, OperatorOverride(1, now)),
    "reopened long ago": lambda now: (1, OperatorOverride(2, now - BOOT_GRACE_S)),
    "reopened eight days ahead": lambda now: (1, OperatorOverride(1, now + 8 * 86_400)),
    "made eight days ahead and reopened now": lambda now: (
        now + 8 * 86_400,
        OperatorOverride(1, now),
    ),
    "with revoked tokens": lambda now: (now - _WEEK_S, OperatorOverride(1)),
}


@dataclass(frozen=True, slots=True)
class Read:
    """A GET of one target.

    Attributes:
        without: Its answer without a token; 200 is whoever has the documents.
        with_token: The same with a good one.
        rule: What refuses it, as `explain` names it.
    """

    policy: Policy
    clock: str
    target: str
    without: int
    with_token: int
    rule: str

    def word(self, now: int) -> tuple[str, int]:
        """The policy word, and the epoch of the instance's tokens."""
        created, override = CLOCKS[self.clock](now)
        return render_policy_word(self.policy, override, created), override.epoch


_REQUIRED: Final = TokenMode.REQUIRED
_DENY, _ALLOW = PathWord.DENY, PathWord.ALLOW
_PATH_OPTIONAL, _PATH_REQUIRED = PathWord.OPTIONAL, PathWord.REQUIRED
_SPELT: Final = (
    f"{USER_DATA} {USER_DATA}?x=/openstack/ {USER_DATA}/ //latest/./user-data/. /ec2/latest/user-data "
    "/%6catest/user%2Ddata /1.0/user-data/x /2009-04-04/user-data //ec2//x/user%2ddata"
)
_HIDDEN: Final = "/a/../b /.. /a/%2e%2e/b /a%00 /a% /a%4 /a%zz"
_OLD: Final = ("of unknown age",)
_AFTER: Final = (*_OLD, "in the second after its boot", "made eight days ahead")
_SEALED_AT: Final = (*_OLD, "made eight days ahead", "reopened long ago")
_BOOTING: Final = ("in the last second of its boot", "reopened now")
_NEW: Final = ("made now",)
_SEALED: Final = (
    Policy(seal_user_data=True),
    Policy(tokens=TokenMode.OFF, seal_user_data=True),
    Policy(seal_user_data=True, paths=((USER_DATA, _ALLOW), ("/openstack", _PATH_OPTIONAL))),
    Policy(seal_user_data=True, paths=(("/", _PATH_OPTIONAL),)),
)
_LOCKED_STACK, _LOCKED_NOCLOUD = (
    Policy(openstack_tokens=_REQUIRED),
    Policy(nocloud_tokens=_REQUIRED),
)
_OTHERS: Final = Policy(paths=(("/openstack", _PATH_REQUIRED), (NOCLOUD, _PATH_REQUIRED)))
_EVERYTHING: Final = Policy(paths=(("/", _PATH_REQUIRED),))
_META_DATA: Final = "/latest/meta-data"

_ROWS: Final[tuple[tuple[Policy, Sequence[str], Mapping[str, str]], ...]] = (
    # Policy, clocks, and by `STATUS-WITHOUT STATUS-WITH [RULE]` the targets that are answered so.
    (Policy(), _OLD, {
        "200 200": f"/ /x/../y /%zz {_SPELT} {META} {NOCLOUD}",
        "405 405 tokens": f"{TOKEN} {TOKEN}?x", "200 405 tokens": f"/{TOKEN}"}),
    (Policy(endpoint=False), _OLD, {"403 403 endpoint": f"/ {TOKEN} {USER_DATA} {META} /nonsense {_HIDDEN}"}),
    (Policy(tokens=TokenMode.OFF), _OLD, {"200 200": f"{_SPELT} {_HIDDEN}", "404 404 tokens": TOKEN}),
    (Policy(tokens=_REQUIRED), _OLD, {
        "401 200 tokens": f"/ /ec2 /nonsense {_HOSTNAME} {_SPELT}",
        "200 200": f"{META} {NOCLOUD}",
        "400 400 path": _HIDDEN,
        "405 405 tokens": f"{TOKEN} /{TOKEN} {TOKEN}/",
        "404 404 tokens": f"/2021-01-03/api/token /ec2{TOKEN} //%65c2/.{TOKEN}/"}),
    (Policy(hop_limit=1), _OLD, {"400 400 path": _HIDDEN, "200 200": _SPELT}),
    (Policy(), ("with revoked tokens",), {"400 400 path": _HIDDEN, "200 200": _SPELT}),
    (_LOCKED_STACK, _AFTER, {
        "401 200 openstack_tokens": f"{META} //openstack /openstack?x", "200 200": USER_DATA}),
    (_LOCKED_STACK, _BOOTING, {"200 200": f"{META} //openstack /openstack?x"}),
    (_LOCKED_NOCLOUD, _AFTER, {
        "401 200 nocloud_tokens": f"{NOCLOUD} /%6eocloud/user-data", "200 200": USER_DATA}),
    (_LOCKED_NOCLOUD, _BOOTING, {"200 200": f"{NOCLOUD} /%6eocloud/user-data"}),
    # Sealed user-data
    *((one, _SEALED_AT, {
        "403 403 seal_user_data": f"{_SPELT} /openstack/latest/user_data {NOCLOUD} /openstack/x/user_data/",
        "200 200": f"{_HOSTNAME} {META} /openstack/latest/user_datas"}) for one in _SEALED),
    *((one, _NEW, {"200 200": f"{_SPELT} /openstack/latest/user_data {NOCLOUD}"}) for one in _SEALED),
    # Paths
    *((Policy(tokens=tokens, paths=((USER_DATA, _DENY),)), _OLD, {
        f"403 403 paths.{USER_DATA}": _SPELT, "200 200": f"/latest/user-datas {_HOSTNAME} {META} {NOCLOUD}"})
      for tokens in (TokenMode.OPTIONAL, TokenMode.OFF)),
    (Policy(paths=((_META_DATA, _PATH_REQUIRED),)), _OLD, {
        f"401 200 paths.{_META_DATA}": f"{_META_DATA} {_META_DATA}/ {_HOSTNAME}", "200 200": f"{USER_DATA} {META}"}),
    (Policy(tokens=TokenMode.OFF, paths=((_HOSTNAME, _PATH_REQUIRED),)), _OLD, {
        f"401 200 paths.{_HOSTNAME}": _HOSTNAME, "200 200": USER_DATA}),
    (Policy(tokens=_REQUIRED, paths=((_META_DATA, _PATH_OPTIONAL),)), _OLD, {
        "200 200": _HOSTNAME, "401 200 tokens": USER_DATA}),
    # No rule is for where tokens are given.
    (Policy(paths=(("/", _DENY), (_META_DATA, _ALLOW))), _OLD, {
        "200 200": _HOSTNAME, "403 403 paths./": f"/ {USER_DATA} {META} /ec2", "405 405 tokens": TOKEN}),
    (Policy(tokens=_REQUIRED, paths=(("/", _DENY), ("/latest", _ALLOW))), _OLD, {
        "401 200 tokens": USER_DATA, "403 403 paths./": META}),
    (_OTHERS, _NEW, {"200 200": f"{META} {NOCLOUD}"}),
    (_OTHERS, _OLD, {
        "401 200 paths./openstack": META, f"401 200 paths.{NOCLOUD}": NOCLOUD,
        "200 200": f"{USER_DATA} /nocloud/meta-data"}),
    (_EVERYTHING, _NEW, {"200 200": META, "401 200 paths./": USER_DATA}),
    (_EVERYTHING, _OLD, {"401 200 paths./": f"{META} {USER_DATA}"}),
    (Policy(openstack_tokens=_REQUIRED, paths=((META, _PATH_OPTIONAL),)), _OLD, {
        "200 200": META, "401 200 openstack_tokens": "/openstack"}),
)  # fmt: skip


def _reads() -> Iterator[Read]:
    for policy, clocks, answers in _ROWS:
        for clock, (answer, targets) in product(clocks, answers.items()):
            without, with_token, *rule = answer.split()
            for target in targets.split():
                yield Read(policy, clock, target, int(without), int(with_token), "".join(rule))


READS: Final = tuple(_reads())


def path_sets() -> list[PathRules]:
    """The path rules of the table, which HAProxy reads when it starts."""
    return [one.policy.paths for one in READS if one.policy.paths]
