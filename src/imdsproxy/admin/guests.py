"""What operators ask about guests: whose an address is, what the guest gets, and the password that it posted."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from imdsproxy.admin.explain import Explainer, Explanation, Probe
from imdsproxy.app.lookup import Lookup
from imdsproxy.app.record_loop import RecordLoop
from imdsproxy.core.identity import Denial, Found, Unknown, deny
from imdsproxy.core.inventory import Inventory
from imdsproxy.core.model import Dialect, InstanceId, IpAddress, NetworkId, Scope
from imdsproxy.core.observation import AddressKey
from imdsproxy.core.wire import HEADER_LOGGED, MISMATCH_TEXT, MapRecord
from imdsproxy.errors import NotFound
from imdsproxy.serving.resolver import Outcome
from imdsproxy.serving.resolver_app import CollectedAnswer, Forward, GuestRequest
from imdsproxy.serving.store import PasswordStore

_COMMON: Final[Mapping[Dialect, str]] = {
    Dialect.EC2: "/latest/meta-data/",
    Dialect.OPENSTACK: "/openstack/latest/meta_data.json",
    Dialect.NOCLOUD: "/nocloud/meta-data",
}


@dataclass(frozen=True, slots=True)
class DocumentAnswer:
    """An answer to a guest."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


@dataclass(slots=True)
class GuestService:
    """Answers questions about guests."""

    inventory: Inventory
    records: RecordLoop
    lookup: Lookup
    explainer: Explainer
    forward: Forward
    passwords: PasswordStore

    async def read_password(self, instance: InstanceId) -> bytes | None:
        """The password that the instance's guest posted, as it was posted; `None` where it has posted none.

        Raises:
            NotFound: There is no such instance.
        """
        self._refuse_unknown(instance)
        return await asyncio.to_thread(self.passwords.read, instance)

    async def clear_password(self, instance: InstanceId) -> bool:
        """Remove it, so that the guest can post another; `False` where there is none. Raises as `read_password`."""
        self._refuse_unknown(instance)
        return await asyncio.to_thread(self.passwords.remove, instance)

    def _refuse_unknown(self, instance: InstanceId) -> None:
        if not self.inventory.sources_of_instance(instance):
            raise NotFound(f"there is no instance {instance}", hint="imdsproxy instance list")

    async def explain(
        self,
        network: NetworkId,
        address: IpAddress,
        path: str | None = None,
        *,
        probe: bool = False,
    ) -> Explanation:
        """Who has `address` in `network`, and why; never raises for an unknown one.

        Args:
            network: The guest's network, or router.
            address: Its address.
            path: Also what the policy says to a GET of it.
            probe: Also send a GET of `path`, or of a document that every instance has.
        """
        explained = await self.explainer.explain(network, address, path)
        if not probe or explained.verdict == "no-network":
            return explained
        asked = path or self._common_path(explained.instance)
        answer = await self.get(network, address, asked)
        return replace(explained, probe=Probe(asked, answer.status))

    def _common_path(self, instance: InstanceId | None) -> str:
        """A document that every instance has which has any."""
        record = None if instance is None else self.inventory.instances.get(instance)
        dialects = frozenset(Dialect) if record is None else record.dialects
        return next((path for dialect, path in _COMMON.items() if dialect in dialects), "/")

    async def explain_instance(
        self, instance: InstanceId, path: str | None = None, *, probe: bool = False
    ) -> list[Explanation]:
        """The same of each address that the instance is known by; `NotFound` where there is no such instance."""
        self._refuse_unknown(instance)
        learned = self.records.learned.items()
        keys = self.inventory.addresses_of(instance)
        keys |= {key for key, entry in learned if entry.instance == instance}
        # Made of its MAC: what few guests ask from, where they have another one.
        chosen = {key for key in keys if not key[1].is_link_local} or keys
        ordered = sorted(chosen, key=lambda key: (key[0], key[1].version, int(key[1])))
        return [await self.explain(*key, path, probe=probe) for key in ordered]

    async def get(
        self,
        network: NetworkId,
        address: IpAddress,
        path: str,
    ) -> DocumentAnswer:
        """The answer that the guest at `address` gets to `GET path` (with its query).

        Nothing is remembered of it; an unknown guest is answered as one is, without being held.
        """
        if not self.inventory.knows(network) and self.lookup.source is None:
            raise NotFound(f"there is no network {network}", hint="imdsproxy network list")
        key = (network, address)
        outcome = await self._look(key)
        if not isinstance(outcome, Denial):
            return await self._get_as_guest(key, outcome, path)
        headers = (("retry-after", "5"),) if outcome is Denial.CONFLICT else ()
        text = MISMATCH_TEXT if outcome is Denial.MISMATCH else ""
        return DocumentAnswer(outcome.status, headers, text.encode())

    async def _look(self, key: AddressKey) -> Outcome:
        """As for a request, except that a known guest need not have its MAC checked; an unknown one is not held."""
        identity = await self.lookup.identify(key)
        if isinstance(identity, Found):
            return self.lookup.known(identity.instance, key)
        if not isinstance(identity, Unknown):
            return deny(identity, in_sync=self.inventory.in_sync)
        declared = key[0] in self.inventory.networks
        outcome: Outcome = Denial.UNKNOWN
        # Of an id that no record has, only a request says whether it is a router's.
        for scope in (None,) if declared else (Scope.NETWORK, Scope.ROUTER):
            outcome = await self.lookup.look(key, scope)
            if outcome is not Denial.UNKNOWN:
                break
        return outcome

    async def _get_as_guest(self, key: AddressKey, record: MapRecord, path: str) -> DocumentAnswer:
        request = GuestRequest(key, "GET", path.encode("utf-8"), by_operator=True)
        answer = CollectedAnswer()
        await self.forward(record, request, answer.take)
        headers = tuple(
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in answer.headers
            if name != HEADER_LOGGED.encode()
        )
        return DocumentAnswer(answer.status, headers, bytes(answer.body))
