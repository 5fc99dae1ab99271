"""`identity show`: the verdict is about the signature alone, and the life about `exp` alone."""

import json
from datetime import UTC, datetime
from typing import Any, Final

import jwt
import pytest

from imdsproxy.cli.identity import decode_token, judge_life
from imdsproxy.errors import RequestRefused
from imdsproxy.issuer.keys import SigningKey, make_key

_NOW: Final = 1_795_000_000
_KEY: Final = make_key("ES256", "https://id.cloud.example", datetime.fromtimestamp(_NOW, UTC))


def _sign(claims: dict[str, Any], key: SigningKey = _KEY) -> str:
    return jwt.PyJWS().encode(json.dumps(claims).encode(), key.private, "ES256", {"kid": _KEY.id})


def _verdict(token: str) -> str:
    keys = [{"id": _KEY.id, "algorithm": "ES256", "state": "signing", "jwk": _KEY.jwk()}]
    return decode_token(token, keys)[2]


@pytest.mark.parametrize(
    "claims",
    [
        {"iat": 4_000_000_000},
        {"nbf": 4_000_000_000},
        {"iat": "soon"},
        {"exp": 1},
        {"exp": "never"},
        {"sub": 7},
        {"jti": 7},
        {"iss": 7},
        {"aud": 7},
        {},
    ],
)
def test_no_claim_makes_a_good_signature_wrong(claims: dict[str, Any]) -> None:
    assert _verdict(_sign(claims)) == "good, of the key that is signing"


def test_the_signature_of_another_key_under_this_id_is_wrong() -> None:
    other = make_key("ES256", "https://else.example", datetime.fromtimestamp(_NOW, UTC))
    assert _verdict(_sign({"iat": _NOW}, other)).startswith("wrong: ")


def test_claims_that_are_no_object_are_no_token() -> None:
    token = jwt.PyJWS().encode(b"[]", _KEY.private, "ES256", {"kid": _KEY.id})
    with pytest.raises(RequestRefused, match="no JSON object"):
        _verdict(token)


@pytest.mark.parametrize(
    ("claims", "life"),
    [
        ({"exp": _NOW + 1}, "valid"),
        ({"exp": _NOW + 0.5}, "valid"),
        ({"exp": 10**400}, "valid"),
        ({"exp": _NOW}, "expired"),
        ({}, "unknown: the token has no exp"),
        ({"exp": None}, "unknown: the token has no exp"),
        ({"exp": "never"}, "unknown: the token has no exp that is a number"),
        ({"exp": True}, "unknown: the token has no exp that is a number"),
        ({"exp": float("inf")}, "unknown: the token has no exp that is a number"),
        ({"exp": float("nan")}, "unknown: the token has no exp that is a number"),
    ],
)
def test_only_a_token_whose_exp_is_past_is_expired(claims: dict[str, Any], life: str) -> None:
    assert judge_life(claims, _NOW) == life
