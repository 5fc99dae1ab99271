"""Genuine verifiers of a guest's token, as they are for operators: they take a good one, and no other."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from support.identity.keystone import AUDIENCE, Keystone, open_keystone, run_openstack
from support.identity.openbao import OpenBao, Refused, open_openbao
from support.identity.signing import KeySet, SigningKey
from support.identity.verifiers import verify
from support.lab import Lab, batch, plug
from support.recorder import Recorder, reply

pytestmark = pytest.mark.root

_PROJECT: Final = "11111111111111111111111111111111"
_OTHER: Final = "22222222222222222222222222222222"
_STRANGER: Final = "33333333333333333333333333333333"
_GUEST: Final = "guest"
_KEYSTONE: Final = "10.250.1.254"
_METADATA: Final = "169.254.169.254"
_INSTANCE: Final = "ac7e3c7e-1111-4222-8333-444455556666"


@pytest.fixture(scope="module")
def place() -> Iterator[Lab]:
    """A host, and a guest that reaches an address of the host."""
    lab = Lab()
    try:
        guest = lab.namespace(_GUEST)
        plug(lab.host, "k0", guest)
        batch(lab.host, [f"address add {_KEYSTONE}/24 dev k0"])
        lines = ["link set eth0 up", "address add 10.250.1.5/24 dev eth0"]
        batch(guest, [*lines, f"address add {_METADATA}/32 dev lo"])
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
        "iss": key_set.issuer.url,
        "sub": f"spiffe://cloud.example/project/{_PROJECT}/instance/{_INSTANCE}",
        "project_id": _PROJECT,
        "instance_id": _INSTANCE,
    }


@pytest.fixture(scope="module")
def bao(place: Lab, key_set: KeySet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenBao]:
    """An OpenBao with the role `vm` for two projects, and a secret of each."""
    with open_openbao(place.host, tmp_path_factory.mktemp("openbao")) as made:
        made.trust(key_set.issuer)
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


@pytest.fixture(scope="module")
def keystone(place: Lab, key_set: KeySet) -> Iterator[Keystone]:
    with open_keystone(place.host, _KEYSTONE, key_set.issuer) as made:
        yield made


@pytest.mark.slow
def test_a_stock_openstack_client_gets_a_token_of_its_own_project_without_a_secret(
    keystone: Keystone, place: Lab, key: SigningKey, claims: dict[str, object], tmp_path: Path
) -> None:
    guest = place.name(_GUEST)
    own, other = (keystone.add_project(name) for name in ("own", "other"))
    clouds = tmp_path / "clouds.yaml"
    token_url = f"http://{_METADATA}/openstack/latest/oauth2/token"
    with Recorder(namespace=guest, address=_METADATA, port=80) as metadata:

        def issue(project: str, **changed: object) -> str:
            """Return the project of Keystone's token, or why there is none."""
            token = key.sign(**{**claims, "aud": AUDIENCE, "project_id": own, **changed})
            answer = json.dumps({"access_token": token, "token_type": "Bearer"}).encode()
            metadata.default = lambda _: reply(answer, headers=("Content-Type: application/json",))
            keystone.write_clouds(clouds, project=project, token_url=token_url)
            done = run_openstack(guest, clouds, "token", "issue", "-f", "json")
            return (
                str(json.loads(done.stdout)["project_id"]) if not done.returncode else done.stderr
            )

        assert issue(own) == own
        assert b"grant_type=client_credentials" in metadata.requests[0].body
        assert "401" in issue(other)
        assert "401" in issue(own, aud="vault")


def test_libraries_take_a_token_for_its_audience_and_by_the_issuers_keys_only(
    place: Lab, key_set: KeySet, key: SigningKey, claims: dict[str, object]
) -> None:
    def verdicts(audience: str, signer: SigningKey) -> set[str]:
        token = signer.sign(**claims, aud="reports")
        found = verify(token, audience=audience, issuer=key_set.issuer, namespace=place.host)
        return set(found.values())

    assert verdicts("reports", key) == {claims["sub"]}
    assert all("aud" in one.lower() for one in verdicts("vault", key))
    assert all("signature" in one.lower() for one in verdicts("reports", SigningKey(key.kid)))
