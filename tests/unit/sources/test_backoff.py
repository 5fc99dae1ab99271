from __future__ import annotations

from imdsproxy.core.timing import Backoff


def test_pauses_double_up_to_the_longest_and_begin_again_after_a_success() -> None:
    backoff = Backoff(first_s=1, longest_s=5)
    assert [backoff.fail() for _ in range(5)] == [1, 2, 4, 5, 5]
    backoff.succeed()
    assert backoff.fail() == 1
