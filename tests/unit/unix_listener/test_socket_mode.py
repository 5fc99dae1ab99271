"""Neutron's table of who gets the socket (neutron/agent/metadata/proxy_base.py)."""

from __future__ import annotations

import pytest

from imdsproxy.unix_listener.plan import deduce_socket_mode

_OWNER, _GROUP, _OTHER = 1, 2, 3


@pytest.mark.parametrize(
    ("word", "mode"),
    [("user", 0o644), ("group", 0o664), ("all", 0o666)],
)
@pytest.mark.parametrize("proxy", [None, 0, _OWNER, _OTHER])
def test_a_word_is_its_mode_whoever_asks(word: str, mode: int, proxy: int | None) -> None:
    found = deduce_socket_mode(
        word, owner=_OWNER, group=_GROUP, proxy_user=proxy, proxy_group=proxy
    )
    assert found == mode


@pytest.mark.parametrize(
    ("user", "group", "mode"),
    [
        (None, None, 0o644),
        (0, _OTHER, 0o644),
        (_OWNER, _OTHER, 0o644),
        (None, _OTHER, 0o644),
        (_OTHER, None, 0o664),
        (_OTHER, _GROUP, 0o664),
        (_OTHER, _OTHER, 0o666),
        # Root's group is a group as another: only its user may do everything.
        (_OTHER, 0, 0o666),
    ],
)
def test_deduced_is_the_narrowest_with_which_the_proxies_can_connect(
    user: int | None, group: int | None, mode: int
) -> None:
    found = deduce_socket_mode(
        "deduce", owner=_OWNER, group=_GROUP, proxy_user=user, proxy_group=group
    )
    assert found == mode
