"""Tokens of a fleet's instances, by HAProxy's real rules and no daemon: signed by keys of the instance alone.

In front of our documents, and of Nova, by every way in.
"""

import time
from collections.abc import Iterator
from typing import Final

import pytest

from imdsproxy.model.policy import Policy, TokenMode
from imdsproxy.model.tokens import TokenKey, instance_key
from support.access_table import META, TOKEN, USER_DATA
from support.guest import Reply, with_token
from support.haproxy_alone import KEY, WAYS, Alone, open_alone

pytestmark = pytest.mark.root

_FLEET, _NEXT, _NEXT_BUT_ONE = (TokenKey(letter * 32) for letter in (b"f", b"g", b"h"))
_LIFETIME: Final = ("X-aws-ec2-metadata-token-ttl-seconds: 300",)


@pytest.fixture(scope="module", params=["documents", "nova"])
def opened(request: pytest.FixtureRequest) -> Iterator[Alone]:
    with open_alone(nova=request.param == "nova", fleet=True) as alone:
        yield alone


@pytest.fixture
def alone(opened: Alone) -> Alone:
    opened.renew()
    return opened


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def _red(fleet_key: TokenKey) -> TokenKey:
    return instance_key(fleet_key, "i-red")


def _put(alone: Alone, way: str = "guests", network: str = "red") -> Reply:
    return alone.ask(TOKEN, network, way, method="PUT", headers=_LIFETIME)


def _status(alone: Alone, way: str, token: str, network: str = "red", path: str = META) -> int:
    return alone.ask(path, network, way, headers=with_token(token)).status


def _later() -> int:
    return int(time.time()) + 600


def test_an_instances_token_is_signed_by_its_own_key_and_good_for_no_other_instance(
    alone: Alone, way: str
) -> None:
    other = instance_key(_FLEET, "i-other")
    alone.write_keys(KEY, i_red=(_red(_FLEET),), i_other=(other,))
    given = _put(alone, way).text
    expires_at = int(given.split(".")[1])
    assert given == alone.token(key=_red(_FLEET), expires_at=expires_at)
    assert [_status(alone, way, given, path=path) for path in (META, USER_DATA, META)] == [200] * 3

    # The address becomes another instance's.
    alone.put(instance="i-other")
    assert _status(alone, way, given) == 401
    others = _put(alone, way).text
    assert others.startswith(other.kid)
    assert _status(alone, way, others) == 200
    alone.put()
    assert [_status(alone, way, one) for one in (others, given)] == [401, 200]


def test_no_token_that_another_key_signs_is_good_for_an_instance_of_the_fleet(
    alone: Alone, way: str
) -> None:
    other = instance_key(_FLEET, "i-other")
    alone.write_keys(KEY, i_red=(_red(_FLEET),), i_other=(other,))
    later = _later()
    good = alone.token(key=_red(_FLEET), expires_at=later)
    # Of another instance's host, of the host's own file, of the fleet itself: which no host has.
    forged = [alone.token(key=key, expires_at=later) for key in (other, KEY, _FLEET)]
    # With the name of a key that is believed, and the MAC of another.
    forged += [good[:20] + one[20:] for one in forged]
    for token in forged * 2:
        assert _status(alone, way, good) == 200
        assert _status(alone, way, token) == 401


def test_an_instance_without_keys_of_the_fleet_goes_on_with_the_hosts(
    alone: Alone, way: str
) -> None:
    alone.write_keys(KEY, i_red=(_red(_FLEET),), current=(_red(_NEXT),))
    given = _put(alone, way, "green").text
    assert given.startswith(KEY.kid)
    assert _status(alone, way, given, "green") == 200
    later = _later()
    for key in (_red(_FLEET), _FLEET, instance_key(_FLEET, "i-green")):
        token = alone.token("green", key=key, expires_at=later)
        assert _status(alone, way, token, "green") == 401
    # Not even where its id is part of an entry's name.
    alone.put("green", instance="current")
    assert _put(alone, way, "green").text.startswith(_red(_NEXT).kid)


def test_while_keys_are_replaced_one_signs_and_those_before_and_after_it_are_believed(
    alone: Alone, way: str
) -> None:
    later = _later()
    keys = _red(_FLEET), _red(_NEXT), _red(_NEXT_BUT_ONE)
    tokens = [alone.token(key=key, expires_at=later) for key in keys]
    for own, statuses in (
        (keys[:1], [200, 401, 401]),
        (keys[:2], [200, 200, 401]),
        ((keys[1], keys[0]), [200, 200, 401]),
        ((keys[1], keys[2], keys[0]), [200, 200, 200]),
        ((keys[2],), [401, 401, 200]),
    ):
        alone.write_keys(KEY, i_red=own)
        # Twice: the second time the connection has seen it.
        for _ in range(2):
            assert [_status(alone, way, token) for token in tokens] == statuses
        assert _put(alone, way).text.startswith(own[0].kid)


@pytest.mark.parametrize("policy", [Policy(), Policy(tokens=TokenMode.REQUIRED)])
def test_a_kept_connection_notices_that_its_instance_comes_to_a_fleet_or_leaves_it(
    alone: Alone, policy: Policy, way: str
) -> None:
    alone.have(policy)
    later = _later()
    of_host = alone.token(expires_at=later)
    of_fleet = alone.token(key=_red(_FLEET), expires_at=later)
    for _ in range(2):
        alone.write_keys(KEY)
        assert [_status(alone, way, of_host) for _ in range(2)] == [200, 200]
        alone.write_keys(KEY, i_red=(_red(_FLEET),))
        assert _status(alone, way, of_host) == 401
        assert [_status(alone, way, of_fleet) for _ in range(2)] == [200, 200]
        alone.write_keys(KEY)
        assert _status(alone, way, of_fleet) == 401


def test_an_instance_of_the_fleet_whose_key_is_missing_gets_no_token_of_another_key(
    alone: Alone, way: str
) -> None:
    alone.write_keys(KEY, i_red=(_red(_FLEET),))
    alone.command(f"del map {alone.directory}/token-keys.map {_red(_FLEET).kid}|i-red")
    reply = _put(alone, way)
    assert (reply.status, reply.headers["retry-after"]) == (503, "1")
    assert _status(alone, way, alone.token(expires_at=_later())) == 401


def test_a_token_is_good_on_the_host_that_its_instance_moves_to(alone: Alone, way: str) -> None:
    alone.write_keys(KEY, i_red=(_red(_FLEET),))
    given = _put(alone, way).text
    # The next host has another key of its own.
    alone.write_keys(TokenKey(b"o" * 32), i_red=(_red(_FLEET),))
    assert _status(alone, way, given) == 200
