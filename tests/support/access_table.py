"""What a guest may read, as a table of policy x request -> answer, for the pure decision and for a bare HAProxy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

from imdsproxy.core.path_rules import PathRules, PathWord
from imdsproxy.core.policy import (
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


_Answers: TypeAlias = Mapping[str, tuple[str, ...]]
"""`STATUS-WITHOUT STATUS-WITH [RULE]`, and which targets are answered so."""

_REQUIRED: Final = TokenMode.REQUIRED
_DENY, _ALLOW = PathWord.DENY, PathWord.ALLOW
_PATH_OPTIONAL, _PATH_REQUIRED = PathWord.OPTIONAL, PathWord.REQUIRED
_SPELLINGS: Final = (
    USER_DATA,
    f"{USER_DATA}?x=/openstack/",
    f"{USER_DATA}/",
    "//latest/./user-data/.",
    "/ec2/latest/user-data",
    "/%6catest/user%2Ddata",
    "/1.0/user-data/x",
    "/2009-04-04/user-data",
    "//ec2//x/user%2ddata",
)
_HIDDEN: Final = ("/a/../b", "/..", "/a/%2e%2e/b", "/a%00", "/a%", "/a%4", "/a%zz")
_PASSES: Final = "200 200"


def _rows() -> Iterator[tuple[Policy, str, _Answers]]:
    old = "of unknown age"
    yield (
        Policy(),
        old,
        {
            _PASSES: ("/", "/x/../y", "/%zz", *_SPELLINGS, META, NOCLOUD),
            "405 405 tokens": (TOKEN, f"{TOKEN}?x"),
            "200 405 tokens": (f"/{TOKEN}",),
        },
    )
    yield (
        Policy(endpoint=False),
        old,
        {"403 403 endpoint": ("/", TOKEN, USER_DATA, META, "/nonsense", *_HIDDEN)},
    )
    # Tokens

    off = Policy(tokens=TokenMode.OFF)
    yield off, old, {_PASSES: (*_SPELLINGS, *_HIDDEN), "404 404 tokens": (TOKEN,)}
    required = Policy(tokens=_REQUIRED)
    yield (
        required,
        old,
        {
            "401 200 tokens": ("/", "/ec2", "/nonsense", _HOSTNAME, *_SPELLINGS),
            _PASSES: (META, NOCLOUD),
            "400 400 path": _HIDDEN,
            "405 405 tokens": (TOKEN, f"/{TOKEN}", f"/ec2{TOKEN}/"),
            "404 404 tokens": ("/2021-01-03/api/token",),
        },
    )
    yield Policy(hop_limit=1), old, {"400 400 path": _HIDDEN, _PASSES: _SPELLINGS}
    yield Policy(), "with revoked tokens", {"400 400 path": _HIDDEN, _PASSES: _SPELLINGS}
    trees = (
        (Policy(openstack_tokens=_REQUIRED), "openstack_tokens", (META, "//openstack", "/openstack?x")),
        (Policy(nocloud_tokens=_REQUIRED), "nocloud_tokens", (NOCLOUD, "/%6eocloud/user-data")),
    )  # fmt: skip
    for tree, rule, paths in trees:
        for clock in (old, "in the second after its boot", "made eight days ahead"):
            yield tree, clock, {f"401 200 {rule}": paths, _PASSES: (USER_DATA,)}
        for clock in ("in the last second of its boot", "reopened now"):
            yield tree, clock, {_PASSES: paths}
    # Sealed user-data

    for sealed in (
        Policy(seal_user_data=True),
        Policy(tokens=TokenMode.OFF, seal_user_data=True),
        Policy(seal_user_data=True, paths=((USER_DATA, _ALLOW), ("/openstack", _PATH_OPTIONAL))),
        Policy(seal_user_data=True, paths=(("/", _PATH_OPTIONAL),)),
    ):
        for clock in (old, "made eight days ahead", "reopened long ago"):
            yield sealed, clock, {
                "403 403 seal_user_data": (
                    *_SPELLINGS, "/openstack/latest/user_data", NOCLOUD, "/openstack/x/user_data/",
                ),
                _PASSES: (_HOSTNAME, META, "/openstack/latest/user_datas"),
            }  # fmt: skip
        yield sealed, "made now", {_PASSES: (*_SPELLINGS, "/openstack/latest/user_data", NOCLOUD)}
    # Paths

    rule = f"paths.{USER_DATA}"
    for tokens in (TokenMode.OPTIONAL, TokenMode.OFF):
        denied = Policy(tokens=tokens, paths=((USER_DATA, _DENY),))
        yield (
            denied,
            old,
            {
                f"403 403 {rule}": _SPELLINGS,
                _PASSES: ("/latest/user-datas", _HOSTNAME, META, NOCLOUD),
            },
        )
    yield (
        Policy(paths=(("/latest/meta-data", _PATH_REQUIRED),)),
        old,
        {
            "401 200 paths./latest/meta-data": (
                "/latest/meta-data",
                "/latest/meta-data/",
                _HOSTNAME,
            ),
            _PASSES: (USER_DATA, META),
        },
    )
    yield (
        Policy(tokens=TokenMode.OFF, paths=((_HOSTNAME, _PATH_REQUIRED),)),
        old,
        {
            f"401 200 paths.{_HOSTNAME}": (_HOSTNAME,),
            _PASSES: (USER_DATA,),
        },
    )
    yield (
        Policy(tokens=_REQUIRED, paths=(("/latest/meta-data", _PATH_OPTIONAL),)),
        old,
        {
            _PASSES: (_HOSTNAME,),
            "401 200 tokens": (USER_DATA,),
        },
    )
    yield (
        Policy(paths=(("/", _DENY), ("/latest/meta-data", _ALLOW))),
        old,
        {
            _PASSES: (_HOSTNAME,),
            "403 403 paths./": ("/", USER_DATA, META, "/ec2"),
            # No rule is for where tokens are given.
            "405 405 tokens": (TOKEN,),
        },
    )
    yield (
        Policy(tokens=_REQUIRED, paths=(("/", _DENY), ("/latest", _ALLOW))),
        old,
        {
            "401 200 tokens": (USER_DATA,),
            "403 403 paths./": (META,),
        },
    )
    others = Policy(paths=(("/openstack", _PATH_REQUIRED), (NOCLOUD, _PATH_REQUIRED)))
    yield others, "made now", {_PASSES: (META, NOCLOUD)}
    yield (
        others,
        old,
        {
            "401 200 paths./openstack": (META,),
            f"401 200 paths.{NOCLOUD}": (NOCLOUD,),
            _PASSES: (USER_DATA, "/nocloud/meta-data"),
        },
    )
    everything = Policy(paths=(("/", _PATH_REQUIRED),))
    yield everything, "made now", {_PASSES: (META,), "401 200 paths./": (USER_DATA,)}
    yield everything, old, {"401 200 paths./": (META, USER_DATA)}
    yield (
        Policy(openstack_tokens=_REQUIRED, paths=((META, _PATH_OPTIONAL),)),
        old,
        {
            _PASSES: (META,),
            "401 200 openstack_tokens": ("/openstack",),
        },
    )


def _reads() -> Iterator[Read]:
    for policy, clock, answers in _rows():
        for answer, targets in answers.items():
            without, with_token, *rule = answer.split()
            for target in targets:
                yield Read(policy, clock, target, int(without), int(with_token), "".join(rule))


READS: Final = tuple(_reads())


def path_sets() -> list[PathRules]:
    """The path rules of the table, which HAProxy reads when it starts."""
    return [one.policy.paths for one in READS if one.policy.paths]
