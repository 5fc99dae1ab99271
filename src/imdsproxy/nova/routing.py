"""Selection of the Nova metadata API for an instance, and signatures of requests (nova/api/metadata/handler.py)."""

import hashlib
import hmac
import re
from dataclasses import dataclass, field
from itertools import chain
from typing import Final

from imdsproxy.model.entities import InstanceId, NetworkId
from imdsproxy.model.wire import NovaRecord

_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
_OPTION: Final = re.compile(rb"metadata_proxy_shared_secret\s*=")
_CONTROL: Final = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def find_secret_fault(secret: bytes) -> str | None:
    """Return why a secret cannot equal Nova's `metadata_proxy_shared_secret`, so that Nova would refuse its signatures.

    Args:
        secret: Secret without blanks around it, which oslo.config removes.
    """
    if secret.startswith(_BYTE_ORDER_MARK):
        return "begins with a byte order mark"
    if b"\n" in secret or b"\r" in secret:
        return "has more than one line"
    if _CONTROL.search(secret):
        return "holds a control character"
    if _OPTION.match(secret):
        return "holds Nova's whole option, and has to hold only the secret"
    return None


def sign_instance(secret: bytes, instance: InstanceId) -> str:
    """Return `X-Instance-ID-Signature`: HMAC-SHA256 of the instance's id, 64 lower-case hexadecimal digits.

    Raises:
        ValueError: The secret is empty: anybody could sign with it.
    """
    if not secret:
        raise ValueError("an empty secret signs nothing")
    return hmac.new(secret, instance.encode(), hashlib.sha256).hexdigest()


@dataclass(frozen=True, slots=True)
class EndpointSet:
    """Nova metadata APIs that have the same instances.

    Attributes:
        next_secret: Secret that replaces it, during the replacement.
    """

    name: str
    secret: bytes = field(repr=False)
    next_secret: bytes | None = field(default=None, repr=False)
    networks: frozenset[str] = frozenset()
    projects: frozenset[str] = frozenset()

    def sign(self, instance: InstanceId) -> tuple[str, ...]:
        """Return one signature, or two during a replacement of the secret."""
        secrets = (self.secret,) if self.next_secret is None else (self.secret, self.next_secret)
        return tuple(sign_instance(secret, instance) for secret in secrets)


@dataclass(frozen=True, slots=True)
class NovaRouting:
    """All endpoint sets. The network's set has priority over the project's; `default` serves all others."""

    sets: tuple[EndpointSet, ...] = ()
    default: str = "default"

    def choose(self, network: NetworkId, project: str) -> EndpointSet | None:
        of_network = (one for one in self.sets if network in one.networks)
        of_project = (one for one in self.sets if project in one.projects)
        rest = (one for one in self.sets if one.name == self.default)
        return next(chain(of_network, of_project, rest), None)

    def record(self, network: NetworkId, instance: InstanceId, project: str) -> NovaRecord | None:
        """Return the data plane's record for requests to Nova; `None` if no endpoint set serves the guest."""
        chosen = self.choose(network, project)
        if chosen is None:
            return None
        return NovaRecord(chosen.name, instance, project, chosen.sign(instance))


def changed_secrets(before: NovaRouting, after: NovaRouting) -> tuple[str, ...]:
    """Return the paths of settings whose files hold another secret than before."""
    known = {one.name: one for one in before.sets}
    return tuple(
        f"nova.endpoint_sets.{one.name}.{setting}"
        for one in after.sets
        if (old := known.get(one.name)) is not None
        for setting, was, now in (
            ("secret_file", old.secret, one.secret),
            ("next_secret_file", old.next_secret, one.next_secret),
        )
        if was is not None and now is not None and was != now
    )
