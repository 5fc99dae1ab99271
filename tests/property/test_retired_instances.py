"""Whatever comes, goes and is revoked: no instance gets an epoch again, and none that is here gets another one."""

from dataclasses import replace
from unittest import mock

from hypothesis import given
from hypothesis import strategies as st

from imdsproxy.model import retired
from imdsproxy.model.policy import UNTOUCHED
from imdsproxy.model.retired import Overrides, parse_retired

_NAMES = [f"i-{number}" for number in range(12)]
_steps = st.lists(
    st.tuples(st.sampled_from(["come", "go", "revoke", "restart"]), st.sampled_from(_NAMES)),
    max_size=60,
)


@given(_steps)
def test_no_token_of_an_epoch_before_the_last_revocation_is_ever_good_again(
    steps: list[tuple[str, str]],
) -> None:
    # A filter so small that it is often wrong, and that little is kept beside.
    with mock.patch.multiple(retired, _BYTES=2, _MOST_KEPT=2):
        own, here = Overrides(), set[str]()
        highest = dict.fromkeys(_NAMES, 0)
        revoked = dict.fromkeys(_NAMES, -1)

        def epoch(name: str) -> int:
            return own.get(name, UNTOUCHED).epoch

        for step, name in steps:
            before = {one: epoch(one) for one in here}
            match step:
                case "come":
                    here.add(name)
                case "go":
                    here.discard(name)
                case "restart":
                    own = Overrides(own.listed, parse_retired(own.retired.render()))
                case _:
                    revoked[name] = epoch(name)
                    now = replace(own.get(name, UNTOUCHED), epoch=epoch(name) + 1)
                    own = own.replace(name, now).retire(here | {name})
                    assert len(own) <= 2 + len(here | {name})
            for one, had in before.items():
                assert epoch(one) == had or (step, one) == ("revoke", name)
            for one in _NAMES:
                assert epoch(one) >= highest[one]
                assert epoch(one) > revoked[one]
                highest[one] = epoch(one)
