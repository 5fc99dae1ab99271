from __future__ import annotations

import pytest

from imdsproxy.core.policy_report import decide_read
from support.access_table import READS, Read

_NOW = 1_795_000_000


@pytest.mark.parametrize("read", READS, ids=lambda read: f"{read.rule or 'passes'} {read.target}")
def test_the_decision_is_that_of_the_table(read: Read) -> None:
    word, _ = read.word(_NOW)
    for token, status in ((False, read.without), (True, read.with_token)):
        decided = decide_read(word, _NOW, read.target, token=token, paths=read.policy.paths)
        assert (decided.status or 200, decided.rule) == (status, read.rule if status != 200 else "")
        assert bool(decided.rule) == bool(decided.why) == (decided.status is not None)
