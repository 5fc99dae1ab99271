"""Settings of identity tokens: the issuer, its audiences, its keys and its processes."""

import re
from pathlib import Path
from typing import Annotated, Final, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator

from imdsproxy.config.section import (
    AbsolutePath,
    AccountName,
    ApiUrl,
    Change,
    HostEndpoint,
    Section,
    UnitName,
    cross,
    form,
    section,
    setting,
)
from imdsproxy.model.policy import AUDIENCE_PATTERN

_PLACES: Final = frozenset({"trust_domain", "instance", "project", "network"})
_PLACE: Final = re.compile(r"\{([^{}]*)\}")
_TEMPLATE: Final = r"^[A-Za-z0-9._:/@{}-]{1,255}$"


def _issuer(text: str) -> str:
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"is not a URL: {error}") from None
    if parts.scheme != "https" or not parts.hostname or port == 0:
        raise ValueError("must begin with https:// and a host")
    if parts.username or parts.query or parts.fragment or "?" in text or "#" in text:
        raise ValueError("must hold no user, query or fragment")
    if text.endswith("/") or text != text.strip() or not text.isascii():
        raise ValueError("must not end with a slash: verifiers compare it byte for byte")
    return text


def _subject(text: str) -> str:
    unknown = set(_PLACE.findall(text)) - _PLACES
    if unknown or re.search(r"[{}]", _PLACE.sub("", text)):
        raise ValueError(f"may hold {', '.join(f'{{{name}}}' for name in sorted(_PLACES))} only")
    if "{instance}" not in text and "{project}" not in text:
        raise ValueError("must hold {instance} or {project}: else all guests would be one subject")
    return text


Audience = Annotated[str, form(AUDIENCE_PATTERN, "an audience: a name, as vault, or a URL")]


class AudienceSettings(Section):
    """Tokens for one audience."""

    lifetime_s: int = setting(600, Change.RESTART, ge=60, le=3600)
    """Seconds for which a token is valid. A stolen token is usable so long. Guests get the same token again for half of
    this time.
    """

    subject: (
        Annotated[
            str, form(_TEMPLATE, "a text with {project} or {instance}"), AfterValidator(_subject)
        ]
        | None
    ) = setting(None, Change.RESTART, examples=["spiffe://{trust_domain}/project/{project}"])
    """Template of the claim `sub`, with `{trust_domain}`, `{project}`, `{instance}` and `{network}`. Null is a SPIFFE
    ID: `spiffe://{trust_domain}/project/{project}/instance/{instance}`, without `/project/{project}` for an instance
    that has no project. For verifiers that compare the whole subject and take few of them.
    """

    placement: Literal["any", "proven"] = setting("proven", Change.RESTART)
    """Whether a hub gives a token on a host's word alone. `proven` refuses the instances whose place the fleet's
    records do not prove. With `any` their tokens hold `"placement": "host"`: a captured host can invent them, so each
    verifier has to check this claim.
    """

    verifier_url: ApiUrl | None = setting(
        None, Change.NOTHING, examples=["https://bao.example:8200/v1/auth/jwt/login"]
    )
    """URL at which `imdsproxy identity check` shows a verifier a token of the instance: a GET with the token as bearer,
    or with `verifier_role` a login at OpenBao or Vault. Null leaves this link unchecked.
    """

    verifier_role: Annotated[str, form(r"^[A-Za-z0-9._-]{1,128}$", "a role's name")] | None = (
        setting(None, Change.NOTHING, examples=["vm"])
    )
    """Role of OpenBao's or Vault's auth method for this login; the check gives its login up at once."""


class CloudSettings(Section):
    """OpenStack of a fleet's guests of Nova: a hub asks it on which host an instance is."""

    enabled: bool = setting(False, Change.RESTART)
    """Ask Nova and Neutron where an instance is that the fleet's records do not have. Name a host in the fleet as Nova
    names it (`nova-compute`'s `host`). Off, tokens of such instances have nothing but the host's word.
    """

    cloud: str | None = setting(None, Change.RESTART, min_length=1)
    """Name of the cloud in `clouds_file`. The account must be able to read every project's servers and ports."""

    clouds_file: AbsolutePath | None = setting(None, Change.RESTART)
    """An openstacksdk `clouds.yaml` that the hub's account can read; null is `/etc/openstack/clouds.yaml`. It contains
    a password: use mode 0640.
    """

    compute_endpoint: ApiUrl | None = setting(None, Change.RESTART)
    """URL of a Nova that accepts requests without a token; instead of `cloud`."""

    network_endpoint: ApiUrl | None = setting(None, Change.RESTART)
    """URL of a Neutron that accepts requests without a token; instead of `cloud`."""

    timeout_s: float = setting(3.0, Change.RESTART, ge=0.5, le=60)
    """Maximum seconds for one query. Hosts wait four seconds for a hub."""

    proof_s: float = setting(120.0, Change.RESTART, ge=1, le=3600)
    """Seconds for which an answer about a host counts. A captured host gets tokens of a guest that has left it for at
    most so long.
    """

    @property
    def clouds_path(self) -> Path:
        """`clouds_file`, or its default."""
        return self.clouds_file or Path("/etc/openstack/clouds.yaml")

    def model_post_init(self, _: object) -> None:
        """Check that either `cloud` or both endpoints locate Nova and Neutron."""
        endpoints = (self.compute_endpoint, self.network_endpoint)
        if self.cloud is not None and endpoints != (None, None):
            raise cross("cloud", "has the endpoints already", "keep `cloud`, or both endpoints")
        if self.enabled and self.cloud is None and None in endpoints:
            raise cross(
                "enabled",
                "needs `cloud`, or `compute_endpoint` and `network_endpoint`",
                "say where Nova and Neutron are",
            )


class IdentitySettings(Section):
    """Identity tokens, by which guests prove who they are to other services."""

    enabled: bool = setting(False, Change.RESTART)
    """Give identity tokens to guests whose policy has `audiences`. Off, because a service that trusts the issuer trusts
    this host. On a host of a fleet the hubs sign.
    """

    issuer: Annotated[str, AfterValidator(_issuer)] | None = setting(
        None, Change.RESTART, examples=["https://id.cloud.example"]
    )
    """URL of the issuer, the claim `iss`: verifiers find keys below it. Choose a name that can stay, and not a host's:
    it is in the configuration of every verifier. Needed where tokens are signed: on a hub, and on a host without a
    fleet.
    """

    trust_domain: (
        Annotated[str, form(r"^[a-z0-9._-]{1,255}$", "a DNS name in lower case")] | None
    ) = setting(None, Change.RESTART, examples=["cloud.example"])
    """SPIFFE trust domain of subjects; null is the host of `issuer`."""

    algorithm: Literal["RS256", "ES256"] = setting("RS256", Change.RESTART)
    """Signature algorithm of keys that the signer makes. Every verifier takes RS256. ES256 needs a verifier that takes
    it: its tokens are a quarter shorter and signed four times as fast. No document of AWS is signed with it.
    """

    key_file: AbsolutePath | None = setting(
        None, Change.RESTART, examples=["/etc/imdsproxy/identity.pem"]
    )
    """File with the operator's own signing key in PEM, for a host without a fleet: RSA of 2048 bits or more, or P-256,
    owned by root with mode 0600. Null lets the signer make and rotate keys. The first key of the file signs. A new key
    in front of the old one signs once verifiers know it; `docs/explanation/identity.md` has the steps. For a
    credential of systemd: `/run/credentials/imdsproxy-signer.service/NAME`.
    """

    audiences: dict[Audience, AudienceSettings] = setting(
        {},
        Change.RESTART,
        examples=[{"vault": {"subject": "spiffe://{trust_domain}/project/{project}"}}],
    )
    """Sections by audience. An audience that a policy allows and that has no section gets the defaults."""

    openstack_audience: Audience | None = setting("keystone", Change.RESTART)
    """Audience of tokens that guests request at `/openstack/latest/oauth2/token`, as stock OpenStack clients do; null
    gives none there.
    """

    openstack: CloudSettings = section(CloudSettings)
    """Where a hub asks about guests of Nova."""

    listen: HostEndpoint | None = setting(None, Change.RELOAD)
    """Address and port where HAProxy serves the issuer's documents with TLS; null serves them nowhere. Link-local and
    wildcard addresses are refused.
    """

    certificate: AbsolutePath | None = setting(None, Change.RELOAD)
    """File with the certificate chain and the private key for `listen`, in PEM."""

    ca_file: AbsolutePath | None = setting(None, Change.NOTHING)
    """PEM file of the CAs that `imdsproxy identity check` trusts for the issuer's documents and verifiers; null trusts
    the system's CAs.
    """

    longest_cache_s: int = setting(3600, Change.RESTART, ge=60, le=604_800)
    """Seconds for which a verifier may keep the issuer's keys. A rotation publishes the next key for twice this time
    before that key signs. 86400 where Entra or AWS verify tokens.
    """

    static_dir: AbsolutePath | None = setting(None, Change.RESTART)
    """Directory for the issuer's documents, for another web server; null is `identity/public` in `paths.state_dir`."""

    user: AccountName | None = setting("imdsproxy-identity", Change.RESTART)
    """Account of the process that answers guests; null keeps the account of its parent (set by the systemd unit)."""

    signer_user: AccountName | None = setting("imdsproxy-signer", Change.RESTART)
    """Account of the process that has the keys; null as for `user`."""

    supervisor: Literal["auto", "spawn", "systemd"] = setting("auto", Change.RESTART)
    """Supervisor that starts and restarts both processes, as `documents.supervisor`."""

    unit: UnitName = setting("imdsproxy-identity.service", Change.RESTART)
    """The systemd unit of the process that answers guests."""

    signer_unit: UnitName = setting("imdsproxy-signer.service", Change.RESTART)
    """The systemd unit of the process that has the keys."""

    def model_post_init(self, _: object) -> None:
        """Refuse an address without a certificate, and a trust domain that would make subjects too long."""
        if self.listen is not None and self.certificate is None:
            raise cross(
                "certificate", "listen needs a certificate", "a PEM file with chain and private key"
            )

    @property
    def longest_life_s(self) -> int:
        """Longest life of a token, in seconds."""
        return max(
            [AudienceSettings().lifetime_s, *(one.lifetime_s for one in self.audiences.values())]
        )

    @property
    def domain(self) -> str:
        """Trust domain, with the default applied."""
        return self.trust_domain or urlsplit(self.issuer or "").hostname or ""
