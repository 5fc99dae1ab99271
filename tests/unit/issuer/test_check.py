"""Each link of the chain between a guest and a verifier, judged from what was seen."""

import json
from typing import Any, Final

import jwt
import pytest

from imdsproxy.errors import ClockWrong, SourceUnavailable
from imdsproxy.issuer.check import (
    Answered,
    Finding,
    Link,
    Seen,
    Silent,
    Verdict,
    close_chain,
    failed,
    find_keys_url,
    find_wrong_signature,
    good,
    judge_keys,
    judge_problem,
    judge_refusal,
    judge_token,
    judge_verifier,
)
from imdsproxy.issuer.claims import Placement, Refusal
from imdsproxy.issuer.exchange import Token, parse_shape, render_problem
from support.identity.signing import SigningKey

_ISSUER: Final = "https://id.cloud.example"
_NOW: Final = 1_800_000_000
_KEY: Final = SigningKey()


def _token(key: SigningKey = _KEY, **claims: object) -> Token:
    text = key.sign(**{"iss": _ISSUER, "sub": "s", "placement": "local", "iat": _NOW, **claims})
    return Token(text, "id-1", _NOW + 600, 600)


def _json(shape: object, status: int = 200) -> Answered:
    return Answered(status, json.dumps(shape).encode())


def _verdicts(found: list[Finding]) -> dict[Link, Verdict]:
    return {one.link: one.verdict for one in found}


def test_a_chain_names_the_first_link_that_fails_and_leaves_the_later_ones_unchecked() -> None:
    chain = close_chain(
        "web", "vault", [good(Link.RECORD, "r"), failed(Link.POLICY, "p", "add it")]
    )
    assert chain.failed is Link.POLICY
    assert [one.link for one in chain.links] == list(Link)
    assert [one.verdict.value for one in chain.links] == ["good", "failed", *["unchecked"] * 5]


def test_a_chain_without_a_failure_has_none() -> None:
    assert close_chain("web", "vault", [good(link, "") for link in Link]).failed is None


@pytest.mark.parametrize(
    ("reason", "in_fleet", "link"),
    [
        (Refusal.SUBJECT, True, Link.PLACEMENT),
        (Refusal.SUBJECT, False, Link.RECORD),
        (Refusal.PLACEMENT, True, Link.PLACEMENT),
        (Refusal.PROJECT, False, Link.POLICY),
        (Refusal.TAGS, False, Link.POLICY),
        (Refusal.AUDIENCE, True, Link.POLICY),
    ],
)
def test_each_refusal_of_a_signer_is_the_failure_of_one_link(
    reason: Refusal,
    in_fleet: bool,  # noqa: FBT001 - pytest passes it by name
    link: Link,
) -> None:
    found = judge_refusal(reason, "vault", in_fleet=in_fleet)
    assert (found.link, found.verdict) == (link, Verdict.FAILED)


@pytest.mark.parametrize(
    ("error", "link"),
    [
        (ClockWrong("a minute", hint="set it"), Link.CLOCKS),
        (SourceUnavailable("away"), Link.SIGNER),
    ],
)
def test_a_problem_of_a_signer_keeps_its_kind_its_words_and_its_hint(
    error: SourceUnavailable, link: Link
) -> None:
    shape = render_problem(error)
    found = judge_problem(shape)
    assert (found.link, found.reason, found.hint) == (link, error.message, error.hint)
    with pytest.raises(type(error), match=error.message):
        parse_shape(shape)


def test_a_good_token_is_good_for_placement_signer_and_clocks() -> None:
    found = judge_token(_token(iat=_NOW - 30), _NOW + 2.0)
    assert _verdicts(found) == dict.fromkeys(
        (Link.PLACEMENT, Link.SIGNER, Link.CLOCKS), Verdict.GOOD
    )
    assert _KEY.kid in found[1].reason


@pytest.mark.parametrize("ahead_s", [-46, 46])
def test_a_token_of_another_time_shows_that_the_clocks_differ(ahead_s: int) -> None:
    (*_, last) = judge_token(_token(iat=_NOW - 30 + ahead_s), _NOW)
    assert (last.link, last.verdict) == (Link.CLOCKS, Verdict.FAILED)
    assert f"{ahead_s:+d} s" in last.reason


def test_a_placement_by_the_host_s_word_alone_is_said() -> None:
    found = judge_token(_token(placement=Placement.HOST.value), _NOW)[0]
    assert "nothing but this host's word" in found.reason


_DISCOVERY: Final[dict[str, Any]] = {"issuer": _ISSUER, "jwks_uri": f"{_ISSUER}/jwks"}


def test_the_keys_are_where_the_discovery_document_says() -> None:
    assert find_keys_url(_ISSUER, _json(_DISCOVERY)) == f"{_ISSUER}/jwks"


@pytest.mark.parametrize(
    ("seen", "said"),
    [
        (Silent("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed"), "VERIFY_FAILED"),
        (_json(_DISCOVERY, 404), "answers 404"),
        (Answered(200, b"<html>"), "no JSON object"),
        (Answered(200, b"[" * 100_000), "no JSON object"),
        (_json({**_DISCOVERY, "issuer": f"{_ISSUER}/"}), f"the issuer {_ISSUER}/"),
        (_json({**_DISCOVERY, "jwks_uri": "http://id.cloud.example/jwks"}), "no jwks_uri"),
    ],
)
def test_another_discovery_document_is_the_issuer_s_failure(seen: Seen, said: str) -> None:
    found = find_keys_url(_ISSUER, seen)
    assert isinstance(found, Finding)
    assert (found.link, found.verdict) == (Link.ISSUER, Verdict.FAILED)
    assert said in found.reason


def test_an_untrusted_certificate_has_the_setting_in_its_hint() -> None:
    found = find_keys_url(_ISSUER, Silent("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed"))
    assert isinstance(found, Finding)
    assert "identity.ca_file" in found.hint


def test_published_keys_with_the_one_that_signs_are_good() -> None:
    seen = _json({"keys": [_KEY.jwk, SigningKey().jwk]})
    assert judge_keys(_token(), "url", seen).verdict is Verdict.GOOD


@pytest.mark.parametrize(
    "keys",
    [[], "none", [SigningKey().jwk], [{**SigningKey().jwk, "kid": _KEY.kid}], [{"kid": _KEY.kid}]],
    ids=["none", "odd", "another", "another of this name", "no key"],
)
def test_published_keys_that_do_not_verify_the_token_are_the_issuer_s_failure(keys: object) -> None:
    found = judge_keys(_token(), "url", _json({"keys": keys}))
    assert (found.link, found.verdict) == (Link.ISSUER, Verdict.FAILED)


def test_a_signature_is_judged_apart_from_the_claims() -> None:
    expired = _token(exp=1).text
    assert find_wrong_signature(expired, _KEY.jwk) is None
    assert find_wrong_signature(expired, SigningKey().jwk) is not None
    assert find_wrong_signature(jwt.encode({}, "k" * 64, "HS256"), _KEY.jwk) is not None


@pytest.mark.parametrize(
    ("seen", "said"),
    [
        (_json({"errors": ['role "vm" could not be found']}, 400), "could not be found"),
        (_json({"error": {"code": 401, "message": "The request"}}, 401), "The request"),
        (_json({"kind": "Status", "message": "Unauthorized"}, 401), "Unauthorized"),
        (Answered(502, b"<h1>Bad\nGateway</h1>"), "Bad Gateway"),
        (Silent("no connection in time"), "no connection in time"),
        (Answered(307, b""), "answers 307"),
    ],
)
def test_a_verifier_s_refusal_is_given_in_its_own_words(seen: Seen, said: str) -> None:
    found = judge_verifier(_token(), "https://bao.example/v1/auth/jwt/login", seen)
    assert (found.link, found.verdict) == (Link.VERIFIER, Verdict.FAILED)
    assert said in found.reason


def test_a_verifier_that_repeats_the_token_does_not_bring_it_into_the_answer() -> None:
    token = _token()
    found = judge_verifier(token, "url", Answered(400, f"bad token: {token.text}".encode()))
    assert token.text[:40] not in found.reason


def test_a_verifier_that_takes_the_token_is_good() -> None:
    assert judge_verifier(_token(), "url", Answered(201, b"{}")).verdict is Verdict.GOOD
