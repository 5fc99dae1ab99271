"""Claims of identity tokens, the subjects they are of, and the ring of keys that signs them."""

import json
from dataclasses import replace
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imdsproxy.issuer.claims import AudienceRules, IssuerRules, Placement, Refusal, plan_claims
from imdsproxy.issuer.documents import BUNDLE_PATH, DISCOVERY_PATH, KEYS_PATH, render_documents
from imdsproxy.issuer.exchange import (
    Token,
    TokenRequest,
    parse_answer,
    parse_request,
    render_answer,
    render_request,
)
from imdsproxy.issuer.ring import KeyRing, KeyState, parse_ring
from imdsproxy.model.entities import Instance, InstanceId, NetworkId
from imdsproxy.model.policy import OperatorOverride, Policy
from imdsproxy.model.subject import Subject, parse_subject, plan_subject

_NOW: Final = 1_795_000_000
_SUBJECT: Final = Subject(
    InstanceId("web-1"),
    NetworkId("red"),
    "p1",
    "az1",
    _NOW - 100,
    audiences=("sts:rgw", "vault"),
    tags=(("role", "db"),),
)
_RULES: Final = IssuerRules(
    "https://id.cloud.example",
    "cloud.example",
    {
        "long": AudienceRules(lifetime_s=3600),
        "entra": AudienceRules(subject="spiffe://{trust_domain}/project/{project}"),
        "loose": AudienceRules(proven=False),
    },
)


def _claims(
    subject: Subject = _SUBJECT,
    audience: str = "vault",
    nonce: str | None = None,
    placement: Placement = Placement.FLEET,
) -> Any:
    return plan_claims(subject, audience, nonce, _RULES, placement, now=_NOW, token_id="id-1")


def _free(**changes: object) -> Subject:
    return replace(_SUBJECT, audiences=("*",), **changes)  # type: ignore[arg-type] # fields of a subject


def test_a_token_states_every_known_fact_and_no_unknown_one() -> None:
    assert _claims(nonce="n") == {
        "iss": "https://id.cloud.example",
        "sub": "spiffe://cloud.example/project/p1/instance/web-1",
        "aud": "vault",
        "iat": _NOW - 30,
        "nbf": _NOW - 30,
        "exp": _NOW + 600,
        "jti": "id-1",
        "instance_id": "web-1",
        "project_id": "p1",
        "network_id": "red",
        "availability_zone": "az1",
        "instance_created": _NOW - 100,
        "placement": "fleet",
        "nonce": "n",
        "tags": {"role": "db"},
    }
    bare = _claims(Subject(InstanceId("i"), NetworkId("n"), None, audiences=("vault",)))
    assert bare["sub"] == "spiffe://cloud.example/instance/i"
    assert not {"project_id", "nonce", "tags", "instance_created", "availability_zone"} & {*bare}


def test_an_audience_has_its_own_lifetime_and_subject() -> None:
    assert _claims(_free(), "long")["exp"] == _NOW + 3600
    assert _claims(_free(), "entra")["sub"] == "spiffe://cloud.example/project/p1"
    assert _claims(_free(), "loose", None, Placement.HOST)["placement"] == "host"


@pytest.mark.parametrize(
    ("subject", "audience", "nonce", "placement", "why"),
    [
        (_SUBJECT, "keystone", None, Placement.FLEET, Refusal.AUDIENCE),
        (_SUBJECT, "*", None, Placement.FLEET, Refusal.REQUEST),
        (_free(), "sts:rgw", None, Placement.FLEET, Refusal.AUDIENCE),
        (_SUBJECT, "sts:rgw", None, Placement.FLEET, Refusal.AUDIENCE),
        (_SUBJECT, "", None, Placement.FLEET, Refusal.REQUEST),
        (_free(), "a" * 129, None, Placement.FLEET, Refusal.REQUEST),
        (_SUBJECT, "vault", "", Placement.FLEET, Refusal.REQUEST),
        (_SUBJECT, "vault", "n" * 257, Placement.FLEET, Refusal.REQUEST),
        (_SUBJECT, "vault", None, Placement.HOST, Refusal.PLACEMENT),
        (_free(project=None), "entra", None, Placement.FLEET, Refusal.PROJECT),
        (_free(tags=(("t", "é" * 700),)), "vault", None, Placement.FLEET, Refusal.TAGS),
    ],
)
def test_a_request_that_the_rules_do_not_allow_gets_no_claims(
    subject: Subject, audience: str, nonce: str | None, placement: Placement, why: Refusal
) -> None:
    assert _claims(subject, audience, nonce, placement) is why


_texts = st.text(max_size=40)


@given(_texts, st.none() | _texts)
def test_whatever_a_guest_asks_a_token_ends_within_an_hour_and_has_one_audience(
    audience: str, nonce: str | None
) -> None:
    claims = _claims(_free(), audience, nonce)
    if not isinstance(claims, Refusal):
        assert _NOW < claims["exp"] <= _NOW + 3600
        assert claims["aud"] == audience
        assert claims.get("nonce") == nonce
        assert claims["sub"] == "spiffe://cloud.example/project/p1/instance/web-1"


_subjects = st.builds(
    Subject,
    st.just(InstanceId("i")),
    st.just(NetworkId("n")),
    st.none() | _texts,
    st.none() | _texts,
    st.none() | st.integers(),
    st.integers(0),
    st.lists(_texts).map(tuple),
    st.lists(st.tuples(_texts, _texts)).map(tuple),
)


@given(_subjects, _subjects)
def test_a_subject_is_read_as_it_was_written_and_each_has_its_id(
    one: Subject, other: Subject
) -> None:
    assert parse_subject(one.render()) == one
    assert (one.id == other.id) == (one == other)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b'{"instance":"i"}', b"\xff"])
def test_a_damaged_subject_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match=r".*"):
        parse_subject(content)


def test_a_subject_has_only_the_tags_that_the_policy_names() -> None:
    instance = Instance(InstanceId("web"), "n", "h", tags=(("name", "x"), ("role", "db")))
    place = NetworkId("red")

    def plan(policy: Policy, epoch: int = 0) -> Subject | None:
        return plan_subject(policy, OperatorOverride(epoch), instance, place, "p")

    allowed = Policy(audiences=("vault",), identity_tags=("role", "zone"))
    found = plan(allowed)
    assert found is not None
    assert found.tags == (("role", "db"),)
    assert plan(Policy(identity_tags=("role",))) is None
    assert plan(replace(allowed, endpoint=False)) is None
    again = plan(allowed, epoch=1)
    assert again is not None
    assert again.id != found.id


@given(
    _subjects | st.text("0123456789abcdef", min_size=1),
    _texts,
    st.none() | _texts,
    st.sampled_from(Placement),
)
def test_a_request_to_the_signer_is_read_as_it_was_written(
    subject: Subject | str, audience: str, nonce: str | None, placement: Placement
) -> None:
    request = TokenRequest(subject, audience, nonce, placement)
    line = render_request(request)
    assert line.count(b"\n") == 1
    assert parse_request(json.loads(line)) == request


@pytest.mark.parametrize("answer", [Token("a.b.c", "id", 5, 600), *Refusal])
def test_an_answer_of_the_signer_is_read_as_it_was_written(answer: Token | Refusal) -> None:
    assert parse_answer(render_answer(answer)) == answer


@pytest.mark.parametrize("line", [b"", b"{}", b"[]", b'{"refused":"x"}', b'{"token":{}}'])
def test_what_is_no_answer_of_a_signer_is_refused(line: bytes) -> None:
    with pytest.raises(ValueError, match=r".*"):
        parse_answer(line)


def test_a_key_is_published_before_it_signs_and_after_it_has_signed() -> None:
    ring = KeyRing().add("a", 1)
    assert (ring.signing, ring.sequence) == ("a", 1)
    ring = ring.add("b", 2)
    assert [(one.id, one.state) for one in ring.entries] == [
        ("a", KeyState.SIGNING),
        ("b", KeyState.NEXT),
    ]
    promoted = ring.promote("b", 3)
    assert [(one.id, one.state, one.since) for one in promoted.entries] == [
        ("b", KeyState.SIGNING, 3),
        ("a", KeyState.OLD, 3),
    ]
    assert promoted.promote("b", 4) == promoted
    assert promoted.drop(["b"]) == promoted
    assert [one.id for one in promoted.drop(["a"]).entries] == ["b"]
    assert promoted.drop(["a"]).sequence > promoted.sequence
    assert parse_ring(promoted.render()) == promoted


def test_another_next_key_takes_the_place_of_the_first() -> None:
    ring = KeyRing().add("a", 1).add("b", 2).add("c", 3)
    assert [one.id for one in ring.entries] == ["a", "c"]


def test_the_documents_have_the_keys_in_order_and_the_use_that_each_reader_wants() -> None:
    keys = [
        {"kid": name, "kty": "RSA", "alg": "RS256", "use": "sig", "x5c": ["QUJD" * 20]}
        for name in ("a", "b")
    ]
    documents = render_documents("https://id.example/x", keys, 7)
    discovery, jwks, bundle = (
        json.loads(documents[path][1]) for path in (DISCOVERY_PATH, KEYS_PATH, BUNDLE_PATH)
    )
    assert discovery["jwks_uri"] == "https://id.example/x/jwks"
    assert jwks == {"keys": keys}
    assert [key["use"] for key in bundle["keys"]] == ["jwt-svid", "jwt-svid"]
    assert bundle["spiffe_sequence"] == 7
