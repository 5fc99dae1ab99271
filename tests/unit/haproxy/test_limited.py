from __future__ import annotations

from imdsproxy.core.haproxy.limits import MOST_SHOWN, Asker, busiest, refused_lately

_HEAD = "# table: fairness, type: string, size:102400, used:3"
_NOW = 1_800_000_000.0


def _line(key: str, **counted: int) -> str:
    numbers = " ".join(
        f"{name}({40_000})={number}" if name.endswith("rate") else f"{name}={number}"
        for name, number in counted.items()
    )
    return f"0x55d8: key={key} use=1 exp=139000 shard=0 {numbers}"


def _busiest(usual: list[str], own: list[str] | None = None) -> list[Asker]:
    return busiest(
        "\n".join([_HEAD, *usual]),
        "\n".join([_HEAD, *(own or [])]),
        requests=4000,
        connections=160,
        now=_NOW,
    )


def test_who_is_at_the_limit_comes_first_and_is_said_to_be_limited() -> None:
    assert _busiest(
        [
            _line("web", conn_cur=3, gpc0_rate=900),
            _line("idle", conn_cur=161, gpc0_rate=0),
            _line("flood", conn_cur=64, gpc0_rate=4000),
        ]
    ) == [
        Asker("flood", None, 4000, 64, limited=True),
        Asker("idle", None, 0, 161, limited=True),
        Asker("web", None, 900, 3, limited=False),
    ]


def test_whoever_has_limits_of_its_own_is_limited_when_it_was_refused_lately() -> None:
    usual = [_line(name, conn_cur=1, gpc0_rate=9000) for name in ("lately", "before")]
    said = [
        _line("lately", gpt0=int(_NOW) - 3, gpc0_rate=20, gpc1_rate=20),
        _line("before", gpt0=int(_NOW) - 60, gpc0_rate=30, gpc1_rate=30),
    ]
    assert refused_lately("\n".join(said), _NOW) == ["lately"]
    assert _busiest(usual, said) == [
        Asker("lately", None, 20, 1, limited=True),
        Asker("before", None, 30, 1, limited=False),
    ]


def test_guests_that_nobody_knows_are_told_by_their_network() -> None:
    assert _busiest([_line("/blue", conn_cur=200, gpc0_rate=5000)]) == [
        Asker(None, "blue", 5000, 200, limited=False)
    ]


def test_no_more_are_told_than_a_screen_takes() -> None:
    assert (
        len(_busiest([_line(f"i-{n}", conn_cur=1, gpc0_rate=n) for n in range(99)])) == MOST_SHOWN
    )
