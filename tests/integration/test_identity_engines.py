"""Genuine verifiers of a guest's token, as they are for operators: they take a good one, and no other."""

from collections.abc import Iterator
from typing import Final

import pytest

from support.identity.openbao import OpenBao, Refused, open_openbao
from support.identity.signing import KeySet, SigningKey
from support.lab import Lab

pytestmark = pytest.mark.root

_PROJECT: Final = "11111111111111111111111111111111"
_OTHER: Final = "22222222222222222222222222222222"
_STRANGER: Final = "33333333333333333333333333333333"
_INSTANCE: Final = "ac7e3c7e-1111-4222-8333-444455556666"


@pytest.fixture(scope="module")
def place() -> Iterator[Lab]:
    lab = Lab()
    try:
        yield lab
    finally:
        lab.close()


@pytest.fixture(scope="module")
def key() -> SigningKey:
    return SigningKey()


@pytest.fixture(scope="module")
def key_set(
    place: Lab, key: SigningKey, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[KeySet]:
    with KeySet(tmp_path_factory.mktemp("issuer"), place.host, [key]) as made:
        yield made


@pytest.fixture
def claims(key_set: KeySet) -> dict[str, object]:
    """Those of a guest of `_PROJECT`, without an audience."""
    return {
        "iss": key_set.issuer,
        "sub": f"spiffe://cloud.example/project/{_PROJECT}/instance/{_INSTANCE}",
        "project_id": _PROJECT,
        "instance_id": _INSTANCE,
    }


@pytest.fixture(scope="module")
def bao(place: Lab, key_set: KeySet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenBao]:
    """An OpenBao with the role `vm` for two projects, and a secret of each."""
    with open_openbao(place.host, tmp_path_factory.mktemp("openbao")) as made:
        made.trust(issuer=key_set.issuer, jwks_url=key_set.url, ca_file=key_set.ca_file)
        made.admit("vm", audience="vault", projects=[_PROJECT, _OTHER])
        for project in (_PROJECT, _OTHER):
            made.write(f"secret/data/{project}/db", data={"password": f"of {project}"})
        yield made


def test_openbao_gives_a_guest_the_secrets_of_its_own_project(
    bao: OpenBao, key: SigningKey, claims: dict[str, object]
) -> None:
    login = bao.login("vm", key.sign(**claims, aud="vault"))
    assert login.metadata["instance_id"] == _INSTANCE
    secret = bao.read(f"secret/data/{_PROJECT}/db", token=login.token)
    assert secret["data"]["data"] == {"password": f"of {_PROJECT}"}
    with pytest.raises(Refused, match="permission denied"):
        bao.read(f"secret/data/{_OTHER}/db", token=login.token)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"aud": "keystone"}, "audience"),
        ({"project_id": _STRANGER}, "project_id"),
        ({"iss": "https://elsewhere.example"}, "issuer"),
        ({"exp": 1_700_000_000}, "expired"),
    ],
)
def test_openbao_refuses_a_token_with_another_claim(
    bao: OpenBao,
    key: SigningKey,
    claims: dict[str, object],
    changed: dict[str, object],
    reason: str,
) -> None:
    token = key.sign(**{**claims, "aud": "vault", **changed})
    with pytest.raises(Refused, match=reason):
        bao.login("vm", token)


def test_openbao_takes_a_key_once_the_issuer_publishes_it(
    bao: OpenBao, key: SigningKey, key_set: KeySet, claims: dict[str, object]
) -> None:
    second = SigningKey()
    token = second.sign(**claims, aud="vault")
    with pytest.raises(Refused, match="signature"):
        bao.login("vm", token)
    key_set.keys = [second, key]
    assert bao.login("vm", token).metadata["project_id"] == _PROJECT
    # A key id proves nothing.
    forged = SigningKey(key.kid).sign(**claims, aud="vault")
    with pytest.raises(Refused, match="signature"):
        bao.login("vm", forged)
