"""Subject of identity tokens: the facts about an instance in one network that its tokens state.

The controller writes each subject to a file that its id names. A record in HAProxy's maps refers to the subject by this
id, which is a digest of all facts. So a changed fact is another subject, and no cached token of the earlier one fits.
"""

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Any, Final

from imdsproxy.model.entities import Instance, InstanceId, NetworkId, Upstream, region_of
from imdsproxy.model.policy import ANY_AUDIENCE, Names, OperatorOverride, Policy

ID_PATTERN: Final = "^[0-9a-f]{32}$"

_IPV4: Final = 4
RESERVED: Final = "sts:"
"""Prefix of audiences that no guest may request: with such a token imdsproxy itself gets role credentials."""


@dataclass(frozen=True, slots=True)
class Subject:
    """Facts about an instance in one network, for the claims of its identity tokens.

    Attributes:
        created_at: Time of the instance's creation, Unix time; `None` if unknown.
        epoch: Number of revocations of the instance's tokens. An instance that is created again under the same id has
            another epoch (`controller.policy_store`), so it is another subject.
        audiences: Audiences that the policy allows, in order; `*` allows any.
        document: Text of the instance identity document, if the policy allows it.
        replaced_keys: Number of times that a fleet's issuer replaced all its keys: tokens of stolen keys are given to
            nobody, since they belong to another subject.
    """

    instance: InstanceId
    network: NetworkId
    project: str | None
    availability_zone: str | None = None
    created_at: int | None = None
    epoch: int = 0
    audiences: Names = ()
    tags: tuple[tuple[str, str], ...] = ()
    document: str | None = None
    replaced_keys: int = 0

    def render(self) -> bytes:
        """Render the subject as one JSON object; equal subjects give equal bytes."""
        return json.dumps(asdict(self), separators=(",", ":"), sort_keys=True).encode("ascii")

    @property
    def id(self) -> str:
        """Digest of all facts: 32 hexadecimal digits."""
        return blake2b(self.render(), digest_size=16).hexdigest()

    def allows(self, audience: str) -> bool:
        if audience.startswith(RESERVED):
            return False
        return audience in self.audiences or ANY_AUDIENCE in self.audiences

    @property
    def named_audiences(self) -> Names:
        """Audiences that the policy names, whose tokens are fetched before a guest requests them."""
        return tuple(one for one in self.audiences if one != ANY_AUDIENCE and self.allows(one))


def plan_subject(
    policy: Policy,
    override: OperatorOverride,
    instance: Instance,
    network: NetworkId,
    project: str | None,
    *,
    region: str | None = None,
    replaced_keys: int = 0,
) -> Subject | None:
    """Return the subject of an instance in a network; `None` if its policy allows neither audience nor document.

    Args:
        project: Project of the instance's port in the network.
        region: Region of the document; `None` derives it from the zone.
    """
    if not (policy.audiences or policy.identity_document) or not policy.endpoint:
        return None
    document = None
    if policy.identity_document:
        document = render_document(instance, network, project, region)
    return Subject(
        instance.id,
        network,
        project,
        instance.availability_zone,
        instance.created_at,
        override.epoch,
        policy.audiences,
        tuple((name, value) for name, value in instance.tags if name in policy.identity_tags),
        document,
        replaced_keys,
    )


def render_document(
    instance: Instance, network: NetworkId, project: str | None, region: str | None
) -> str:
    """Render the instance identity document of an instance in a network; equal facts give equal bytes.

    Source: AWS, "Instance identity documents" (`2017-09-30`). Facts that nobody here knows are null, as at AWS.
    """
    addresses = (
        one for port in instance.ports if port.network == network for one in port.addresses
    )
    of_ipv4 = (str(one) for one in addresses if one.version == _IPV4)
    zone, created = instance.availability_zone, instance.created_at
    begun = None if created is None else datetime.fromtimestamp(created, UTC)
    facts = {
        "accountId": project,
        "architecture": None,
        "availabilityZone": zone,
        "billingProducts": None,
        "devpayProductCodes": None,
        "marketplaceProductCodes": None,
        "imageId": None,
        "instanceId": instance.id if instance.upstream is Upstream.NOVA else instance.ec2_id,
        "instanceType": instance.instance_type,
        "kernelId": None,
        "pendingTime": None if begun is None else f"{begun:%Y-%m-%dT%H:%M:%SZ}",
        "privateIp": next(of_ipv4, None),
        "ramdiskId": None,
        "region": region or region_of(zone),
        "version": "2017-09-30",
    }
    return json.dumps(facts, indent=2)


def parse_subject(content: bytes) -> Subject:
    """Parse the result of `Subject.render`; raise `ValueError` if it is damaged."""
    try:
        shape: dict[str, Any] = json.loads(content)
        lists = {"audiences": tuple(shape["audiences"]), "tags": tuple(map(tuple, shape["tags"]))}
        subject = Subject(**{**shape, **lists})
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"no subject: {error}") from error
    if subject.render() != content:
        raise ValueError("no subject: it has another form")
    return subject
